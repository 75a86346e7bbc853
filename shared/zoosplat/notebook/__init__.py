"""What `zoosplat.open` returns: the runs and results of a project, read-only, for notebooks and scripts."""

from zoosplat.notebook.reconstruction import GaussianArrays, PinholeCamera, RenderedImage

__all__ = ["GaussianArrays", "PinholeCamera", "RenderedImage"]
