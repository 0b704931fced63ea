"""Hold what every method stands on: hooks, targets, records, modes, gradient checkpointing and tensor files."""
