"""Networks in integers: exact on every device."""
