"""Sharing runs and stores through the Hugging Face hub."""
