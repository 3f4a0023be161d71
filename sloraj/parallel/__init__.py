"""Tensor parallelism: the mesh, the one sharding table, and the collectives of the step."""
