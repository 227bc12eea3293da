"""The tasks of models: losses, answers, scores."""
