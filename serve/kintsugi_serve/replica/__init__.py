"""What a replica does: the model in service, batches of images, and large ones strip by strip."""
