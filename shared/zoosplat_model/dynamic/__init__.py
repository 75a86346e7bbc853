"""One scene, optimised over time: canonical Gaussians and a deformation field (4D Gaussian Splatting, Wu 2024)."""
