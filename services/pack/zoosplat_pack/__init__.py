"""Stage pack: see README.md beside this package."""
