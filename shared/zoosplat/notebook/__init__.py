"""What `zoosplat.open` returns: the runs and results of a project, read-only, for notebooks and scripts."""
