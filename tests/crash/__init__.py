"""Extraction under kills, failing disks and power cuts; see `tests.crash.torture`."""
