"""Lists of images: ``python -m dataset.splits make | check | suggest``."""
