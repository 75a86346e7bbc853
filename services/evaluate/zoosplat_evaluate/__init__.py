"""Stage evaluate: see README.md beside this package."""
