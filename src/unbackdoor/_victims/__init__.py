"""Victims: poison, train, measure, describe."""
