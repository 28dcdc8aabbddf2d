"""Hostile files: structure-aware mutation of real ones, run with limits on time and memory.

`mutate` changes bytes, `image_seeds`, `weight_seeds` and `store_seeds` make whole files and say where their
headers are, `targets` is what meets them, `limits` runs a target in a child process that may be killed, `long` is
``make fuzz``.
"""
