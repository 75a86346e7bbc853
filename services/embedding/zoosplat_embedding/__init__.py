"""Stage embedding: see README.md beside this package."""
