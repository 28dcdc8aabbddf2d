"""Figures and measures made from cached features."""
