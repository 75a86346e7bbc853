"""The work of the `zoosplat` commands: what they do and print."""
