"""Hugging Face checkpoints: model families, the mapping of their tensors, reading and writing."""
