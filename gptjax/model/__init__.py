"""The decoder: leaf layers, attention backends, feed-forward, and the stack of blocks."""
