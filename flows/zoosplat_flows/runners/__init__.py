"""Where a stage's container or process runs: the same call, another place."""
