"""The report on a store: one object with all numbers, and a page, CSV, JSON, LaTeX and Markdown made of it."""
