"""Weights mixed with those of a base, in memory and on disk."""
