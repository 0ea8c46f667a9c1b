"""Networks, prior and scheduler on a CPU: compiled loops over NumPy arrays, without torch."""
