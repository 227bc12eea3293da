"""The demos: one story, told on images and on texts."""
