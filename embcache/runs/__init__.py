"""Saved results and their folders."""
