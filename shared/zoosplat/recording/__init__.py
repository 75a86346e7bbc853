"""Recordings: their sources, calibration and videos, and the checks of their files."""
