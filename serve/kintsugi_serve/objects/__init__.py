"""S3 objects that requests touch: their places, and results under the address of their question."""
