"""Hierarchical unlearning: latents clamped, every way of choosing them side by side."""
