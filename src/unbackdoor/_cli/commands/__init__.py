"""The work of each command, in the order in which it is done: check, load, work, score, write."""
