"""Files, objects on S3 and zarr groups: URLs, reading and writing, array schemas, locks and errors."""
