"""What the evaluation suites need cached: labelled texts, words and entities, and their residuals."""
