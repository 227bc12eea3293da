"""Inverting triggers: searches for what moves a model from class to class, and unlearning what they find."""
