"""Drawn scenes to try everything on: ``python -m dataset.demo DIR``."""
