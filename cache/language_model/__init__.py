"""The language model: where its files come from, how it is cut at a hook, its losses and what it writes."""
