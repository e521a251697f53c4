"""The report, the ablation table, and what they show."""
