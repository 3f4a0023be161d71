"""Policies that the scheduler asks: whom to drop, what to send ahead. Host code without JAX."""
