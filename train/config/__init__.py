"""The plan, its runs, and the tables they are made of."""
