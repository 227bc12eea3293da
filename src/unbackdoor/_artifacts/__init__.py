"""What is written: directories that are complete or not there, records and cards."""
