"""Attacks on data: the poisoned rows and their labels, the trigger, and the file that records both."""
