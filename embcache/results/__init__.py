"""Results into tables."""
