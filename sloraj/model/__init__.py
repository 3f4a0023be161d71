"""The Flax NNX Llama, in the per-device view, and the loading of its parameters."""
