"""Immutable, verified shards of features: recipes, commits, and reading them back."""
