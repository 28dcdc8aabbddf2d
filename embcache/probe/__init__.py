"""Stage 2: splits, heads, metrics and results on cached features; needs neither images nor backbones."""
