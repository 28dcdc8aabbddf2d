"""Whole studies: the paper's tables and figures, your own grids, the demonstration."""
