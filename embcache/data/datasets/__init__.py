"""Datasets with a published layout, one file each."""
