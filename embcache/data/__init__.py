"""Labeled images as tables, one module per published layout, and the decoder of their files. Never imports torch."""
