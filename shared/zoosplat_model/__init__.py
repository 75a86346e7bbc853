"""The model: carving, network, Gaussian rasterisation, losses and metrics. The only place that imports torch."""
