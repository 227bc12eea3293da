"""Trigger inversion: searches for changes that move a model from class to class, and unlearning them."""
