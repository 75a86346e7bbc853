"""Cameras, projection, rotations, optimal transport and visual hulls, in NumPy."""
