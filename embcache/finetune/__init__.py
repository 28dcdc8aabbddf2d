"""Finetuning: images pass through backbones and a head that are trained together."""
