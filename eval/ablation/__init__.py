"""Whether the hierarchy helps, and which component: the table over seeds, the tests, and a sentence a component."""
