"""A purified model attacked once more."""
