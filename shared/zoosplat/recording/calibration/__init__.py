"""Calibration files: one reader a format, the up direction, and the writer of HDF5 files."""
