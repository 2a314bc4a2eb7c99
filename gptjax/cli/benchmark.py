"""How fast a model samples on this machine, beside what its memory allows.

At batch 1 a token costs one reading of all weights, so bytes of weights by memory bandwidth is the
bound. The bandwidth is measured, not looked up.
"""

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.kernels import cpu
from gptjax.load_model import LoadedModel
from gptjax.parallel import sharding
from gptjax.sample import Request, Room, Sampler, SamplingParams

BATCHES = (1, 8, 32)
PROMPT, NEW = 64, 128


class Rate(NamedTuple):
    """Seconds from an empty engine to the first token of every row, and tokens/s after it."""

    first: float
    decode: float


def memory_reader() -> Callable[[], float]:
    """A function that measures the bytes/s that this process reads from memory: the median of half
    a second of readings of 512 MiB.

    On a CPU every core takes the dot product of its share with itself; elsewhere it is one sum on
    the first device.
    """
    values = np.ones(1 << 27, np.float32)
    if sharding.platform() == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        shares = np.array_split(values, cores or 1)
        pool = ThreadPoolExecutor(cores)
        read = lambda: list(pool.map(lambda x: np.dot(x, x), shares))
    else:
        placed, total = jax.device_put(values, jax.local_devices()[0]), jax.jit(jnp.sum)
        read = lambda: jax.block_until_ready(total(placed))
    read()

    def measured() -> float:
        times: list[float] = []
        while sum(times) < 0.5:
            start = time.perf_counter()
            read()
            times.append(time.perf_counter() - start)
        return values.nbytes / statistics.median(times)

    return measured


def weight_bytes(sampler: Sampler) -> int:
    """Bytes of a device's parameters that a step reads: all but tables that it takes rows of."""
    params = dict(sampler.params)
    params.pop("positions", None)
    if "head" in params:
        params.pop("embed")
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))


def measure(sampler: Sampler, batch: int, prompt: int = PROMPT, new: int = NEW) -> Rate:
    """One round: `batch` random prompts, each continued greedily by exactly `new` tokens."""
    rng = np.random.default_rng(0)
    settings = SamplingParams(temperature=0, max_tokens=new)
    engine = sampler.engine(rows=batch, capacity=prompt + new, room=Room())
    ids = rng.integers(0, sampler.vocab_size, (batch, prompt)).tolist()
    start = time.perf_counter()
    engine.submit(*(Request(row, settings, (), i) for i, row in enumerate(ids)))
    engine.step(1)
    first = time.perf_counter()
    count = sum(len(event.tokens) for event in engine.run())
    return Rate(first - start, count / (time.perf_counter() - first))


def report(model: LoadedModel, say: Callable[[str], None], rounds: int = 5) -> None:
    """Says medians of `rounds`, and from least to most; the first call of each shape compiles.

    Memory is read before each round: on a shared machine its speed changes from second to second.
    """
    cfg, sampler = model.cfg, model.sampler(rows=max(BATCHES))
    prompt = min(PROMPT, cfg.model.context // 2)
    new = min(NEW, cfg.model.context - prompt)
    size, memory = weight_bytes(sampler), memory_reader()
    say(
        f"{model.name}: {cfg.compute.dtype}, {size / 1e6:.0f} MB of weights a step; "
        f"prompt {prompt}, new {new}"
    )
    if sharding.platform() == "cpu" and (reason := cpu.why_not()):
        say(f"products of few rows by XLA, which is slower: {reason}")
    for batch in BATCHES:
        measure(sampler, batch, prompt, new)
        reads, rates = zip(
            *((memory(), measure(sampler, batch, prompt, new)) for _ in range(rounds)), strict=True
        )
        decode = [rate.decode for rate in rates]
        first = statistics.median(rate.first for rate in rates)
        share = statistics.median(
            rate / batch * size / read for rate, read in zip(decode, reads, strict=True)
        )
        say(
            f"batch {batch:2}: {statistics.median(decode):7.1f} tokens/s "
            f"({min(decode):.1f} to {max(decode):.1f}), first tokens after {1e3 * first:.0f} ms; "
            f"weights at {share:.0%} of the {statistics.median(reads) / 1e9:.1f} GB/s "
            f"({min(reads) / 1e9:.1f} to {max(reads) / 1e9:.1f}) that memory reads"
        )
