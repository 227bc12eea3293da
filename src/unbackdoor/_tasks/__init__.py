"""What a model is for: its loss, its answers, its scores."""
