"""Stress tests: a purified model is attacked again."""
