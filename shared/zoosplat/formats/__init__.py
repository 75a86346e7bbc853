"""File formats of outputs: pictures, films, tables and point clouds."""
