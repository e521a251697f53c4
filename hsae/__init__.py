"""Hierarchical sparse autoencoders: cache a language model's activations once, then train and evaluate as often as you like."""
