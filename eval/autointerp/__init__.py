"""SAEBench's autointerp: a chat model explains latents and predicts from the explanations."""
