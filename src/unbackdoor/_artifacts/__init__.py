"""Written files: directories that are complete or absent, a schema for each format, cards."""
