"""The device mesh, what lies where on it, and the collectives written out by hand."""
