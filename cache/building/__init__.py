"""Building, checking, mending and copying stores."""
