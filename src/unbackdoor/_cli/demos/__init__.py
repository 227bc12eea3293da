"""The demos: the same story on images and on texts."""
