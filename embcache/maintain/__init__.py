"""Looking after what is cached: listing, checking, repairing, freeing and exporting it."""
