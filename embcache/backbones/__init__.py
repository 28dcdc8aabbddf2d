"""Frozen networks: specifications, catalog, checkpoints, transforms."""
