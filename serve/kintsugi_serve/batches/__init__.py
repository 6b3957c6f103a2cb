"""Whole prefixes: what a batch is, what the store holds of it, and who runs it."""
