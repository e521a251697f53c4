"""How levels are composed of each other: measures with their nulls, failures by name, stability over seeds."""
