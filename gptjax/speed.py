"""How fast a model samples on this machine, beside what its memory allows.

At batch 1 a token costs one reading of all weights, so bytes of weights by memory bandwidth is the
bound. The bandwidth is measured here, not looked up.
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

from gptjax import native, sharding
from gptjax.opening import Opened
from gptjax.sample import Request, Room, Sampler, Settings

BATCHES = (1, 8, 32)
PROMPT, NEW = 64, 128


class Rate(NamedTuple):
    """Seconds from an empty engine to the first token of every row, and tokens/s after it."""

    first: float
    decode: float


def bandwidth(seconds: float = 2.0) -> float:
    """Bytes/s that this process reads from memory, the best of many readings of 512 MiB.

    On a CPU every core takes the dot product of its share with itself; elsewhere it is one sum on
    the first device.
    """
    size = 1 << 27
    if sharding.platform() == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        shares = np.array_split(np.ones(size, np.float32), cores or 1)
        with ThreadPoolExecutor(cores) as pool:
            return _best(lambda: list(pool.map(lambda x: np.dot(x, x), shares)), 4 * size, seconds)
    x = jax.device_put(np.ones(size, np.float32), jax.local_devices()[0])
    total = jax.jit(jnp.sum)
    return _best(lambda: jax.block_until_ready(total(x)), 4 * size, seconds)


def _best(read: Callable[[], object], size: int, seconds: float) -> float:
    read()
    times = []
    while sum(times) < seconds:
        start = time.perf_counter()
        read()
        times.append(time.perf_counter() - start)
    return size / min(times)


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
    settings = Settings(temperature=0, max_tokens=new)
    engine = sampler.engine(rows=batch, capacity=prompt + new, room=Room())
    ids = rng.integers(0, sampler.vocab_size, (batch, prompt)).tolist()
    start = time.perf_counter()
    engine.submit(*(Request(row, settings, (), i) for i, row in enumerate(ids)))
    engine.step(1)
    first = time.perf_counter()
    count = sum(len(event.tokens) for event in engine.run())
    return Rate(first - start, count / (time.perf_counter() - first))


def report(model: Opened, say: Callable[[str], None], rounds: int = 3) -> None:
    """Says medians of `rounds`, and from least to most; the first call of each shape compiles."""
    cfg, sampler = model.cfg, model.sampler(rows=max(BATCHES))
    prompt = min(PROMPT, cfg.model.context // 2)
    new = min(NEW, cfg.model.context - prompt)
    size, read = weight_bytes(sampler), bandwidth()
    say(
        f"{model.name}: {cfg.compute.dtype}, {size / 1e6:.0f} MB of weights a step; memory reads "
        f"{read / 1e9:.1f} GB/s, which is {read / size:.1f} steps/s; prompt {prompt}, new {new}"
    )
    if sharding.platform() == "cpu" and (reason := native.why_not()):
        say(f"products of few rows by XLA, which is slower: {reason}")
    for batch in BATCHES:
        measure(sampler, batch, prompt, new)
        rates = [measure(sampler, batch, prompt, new) for _ in range(rounds)]
        decode = [rate.decode for rate in rates]
        median = statistics.median(decode)
        first = statistics.median(rate.first for rate in rates)
        share = median / batch * size / read
        say(
            f"batch {batch:2}: {median:7.1f} tokens/s ({min(decode):.1f} to {max(decode):.1f}), "
            f"first tokens after {1e3 * first:.0f} ms, {share:.0%} of the bandwidth"
        )
