"""Attacks on data: which rows, which labels, what a trigger is, how it is stored."""
