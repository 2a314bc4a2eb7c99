"""Attention: the layer and its backends."""
