"""Names and facts: what `list` prints, as data, and how a class is found by its name."""
