"""Models of others: loaded without trust, called, looked into."""
