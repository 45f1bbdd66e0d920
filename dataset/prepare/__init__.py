"""Fetch what training reads and git does not keep: ``python -m dataset.prepare COMMAND``."""
