"""Labelled images as tables: one module a dataset, and the decoder of their files. Never imports torch."""
