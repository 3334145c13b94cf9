"""Batches for the trainer: from a loader service to normalised tensors on the devices."""
