"""Names and facts that `list` prints, as data, and the lookup of classes by name."""
