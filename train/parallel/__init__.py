"""Training by several workers: who takes part, and how a batch or the latents are divided among them."""
