"""A run's folder: what it is, what happened, its checkpoints and results."""
