"""Whose turn it is, whom to drop, what to send ahead. Host values only; never imports JAX."""
