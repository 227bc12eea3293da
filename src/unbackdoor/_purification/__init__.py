"""Purification: what a method is and gets, the one runner, settings chosen on the clean examples."""
