"""Entropy coders of the payload's sections."""
