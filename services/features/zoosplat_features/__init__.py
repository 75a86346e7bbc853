"""Stage features: see README.md beside this package."""
