"""Stage train: see README.md beside this package."""
