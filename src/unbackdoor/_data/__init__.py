"""Data sets: reading, labels, images and texts, and what models get of them."""
