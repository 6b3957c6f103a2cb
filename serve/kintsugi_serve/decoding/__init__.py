"""Foreign bytes, read by confined processes that may die of them; large TIFFs by way of the disk."""
