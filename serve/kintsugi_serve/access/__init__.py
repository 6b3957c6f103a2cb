"""What callers are known and named by: their keys, and plain S3 addresses."""
