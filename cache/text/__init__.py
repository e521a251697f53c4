"""Text: where documents come from, and how they become rows of tokens."""
