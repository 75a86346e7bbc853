"""Stage segment: see README.md beside this package."""
