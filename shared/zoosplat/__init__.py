"""What every zoosplat stage shares: configuration, cameras, geometry, storage and the stage contract. No torch."""

__version__ = "0.1.0"
