"""Does the hierarchy help, and which component is responsible: the table over seeds, the tests, and a sentence a component."""
