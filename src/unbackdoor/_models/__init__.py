"""Models of others: loading without trust, calling, inspecting."""
