"""Scores of models, and whether a purified one is still usable."""
