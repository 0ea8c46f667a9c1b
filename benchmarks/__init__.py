"""Measurements behind the README's figures; run from the repository's root, e.g. ``python -m benchmarks.rd --help``."""
