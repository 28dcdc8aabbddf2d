"""Stage 1: images through frozen backbones into feature stores."""
