"""Stage ingest: see README.md beside this package."""
