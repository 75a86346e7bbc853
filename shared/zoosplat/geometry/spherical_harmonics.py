"""Constants of real spherical harmonics."""

from __future__ import annotations

# The constant harmonic, 1 / (2 sqrt(pi)). A Gaussian's colour c is stored as the coefficient (c - 0.5) / SH_C0 (Kerbl
# 2023).
SH_C0 = 0.28209479177387814
