"""Who computes the shards of an extraction."""
