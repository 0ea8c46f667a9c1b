"""Entropy coding on a GPU."""
