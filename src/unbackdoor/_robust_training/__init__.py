"""Training on data that may be poisoned: the runner, and what its trainers work with."""
