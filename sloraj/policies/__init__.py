"""In which order waiting requests are admitted. Host values only; never imports JAX."""
