"""Masks and lists from labeling tools: readers and writers of their files, one a module."""
