"""Data sets: reading, labels, images and texts, and the inputs that models get."""
