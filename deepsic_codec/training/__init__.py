"""Data, loss and trainer."""
