"""Whole studies: the paper's tables and figures, your own grids, the demonstration.

What is missing is extracted, probed or finetuned; the saved run of an equal request is reused.
"""
