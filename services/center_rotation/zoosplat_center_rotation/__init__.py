"""Stage center_rotation: see README.md beside this package."""
