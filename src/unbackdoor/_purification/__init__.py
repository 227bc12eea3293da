"""Purification: the protocol of methods, their run, the one runner, settings chosen on the clean examples."""
