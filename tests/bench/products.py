"""Time the matrix products of a training step alone, each shape by itself.

    python tests/bench/products.py jax gpt2v float32
    torchenv/bin/python tests/bench/products.py torch gpt2v float32

The shapes are those of tests/bench/train_step.py: 6 layers of 384 and 4096 tokens, with the output
layer of a vocabulary of 128 (char) or 50,304 (gpt2v). Each product is made forward and for both of
its gradients. Prints the sum of each shape's best time of seven, as often as a step makes it: what
a step would take if it had nothing but its products. Attention is left out.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

TOKENS, WIDTH, LAYERS, ROUNDS = 4096, 384, 6, 7
VOCABULARY = {"char": 128, "gpt2v": 50304}


def products(shape: str) -> list[tuple[int, int, int, int]]:
    """(count, m, k, n) of the products [m, k] x [k, n] of a step."""
    linear = [(WIDTH, 3 * WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH)]
    layers = [(LAYERS, *one) for one in linear] + [(1, WIDTH, VOCABULARY[shape])]
    return [
        one
        for count, i, o in layers
        for one in ((count, TOKENS, i, o), (count, TOKENS, o, i), (count, i, TOKENS, o))
    ]


def library(name: str, dtype: str) -> tuple[Callable[[int, int], Any], Callable[[Any, Any], Any]]:
    """(a random matrix of two sizes, a product that is waited for)."""
    if name == "torch":
        import torch

        kind = getattr(torch, dtype)
        return lambda m, n: torch.randn(m, n).to(kind), torch.mm
    from gptjax.runtime import malloc

    malloc.keep_memory()  # as in training: else pages of a result over 32 MiB are zeroed anew
    import jax
    import jax.numpy as jnp
    import numpy as np

    dot = jax.jit(jnp.dot)
    random = lambda m, n: jnp.asarray(np.random.randn(m, n), dtype)
    return random, lambda a, b: dot(a, b).block_until_ready()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("library", choices=("jax", "torch"))
    parser.add_argument("shape", choices=VOCABULARY)
    parser.add_argument("dtype", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    random, multiply = library(args.library, args.dtype)
    seconds = operations = 0.0
    for count, m, k, n in products(args.shape):
        a, b = random(m, k), random(k, n)
        multiply(a, b)
        times = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            multiply(a, b)
            times.append(time.perf_counter() - began)
        seconds += count * min(times)
        operations += count * 2.0 * m * k * n
    print(f"{seconds:.3f} s, {operations / seconds / 1e9:.0f} GF/s")


if __name__ == "__main__":
    main()
