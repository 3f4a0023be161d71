"""Real scheduler, pool and adapters under a simulated clock, with a device that is a fitted model.

`docs/simulator.md` says what is simulated, how the model is fitted and how far it can be trusted.
Nothing here imports JAX.
"""
