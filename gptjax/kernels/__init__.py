"""Kernels written in C for decoding on a CPU."""
