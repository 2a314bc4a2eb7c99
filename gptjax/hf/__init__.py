"""Hugging Face folders: families, the mapping of their tensors, and their files."""
