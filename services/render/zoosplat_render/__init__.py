"""Stage render: see README.md beside this package."""
