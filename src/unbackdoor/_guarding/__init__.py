"""Guards: what runs them, what they fitted, how well they do."""
