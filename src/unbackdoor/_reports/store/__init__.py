"""The report on a store: one object with all numbers, then a page, CSV, JSON, LaTeX and Markdown from it."""
