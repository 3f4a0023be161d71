"""What the paper compares with that is not this engine; each serves the same traces."""
