"""The device mesh, sharding, and the collectives that are written out by hand.

Names of arrays end in their shape, a letter for each dimension; the letters are listed at the top
of each file. A capital letter is a whole dimension. A lower-case letter is one device's share of
it: inside `jax.shard_map`, where q_BTHC is split by sequence and by head, a device has q_bThC.
"""
