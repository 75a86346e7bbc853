"""Stage crop: see README.md beside this package."""
