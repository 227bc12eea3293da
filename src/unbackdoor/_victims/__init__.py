"""Victims: models with a backdoor that was planted on purpose, and their clean controls."""
