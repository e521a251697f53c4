"""SAE definitions, losses, the run plan and the training loop."""
