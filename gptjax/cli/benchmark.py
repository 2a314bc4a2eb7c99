"""The decode speed of a model on this machine, compared with its memory bandwidth.

At batch 1 a decode step reads all weights once, so the time to read them bounds the time of a
token. The bandwidth is measured, not looked up.
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
from gptjax.sample import EngineLimits, Request, Sampler, SamplingParams

BATCHES = (1, 8, 32)
PROMPT, NEW = 64, 128


class Rate(NamedTuple):
    """Seconds until every slot has its first token, prefill included, and tokens/s after that."""

    first: float
    decode: float


def memory_reader() -> Callable[[], float]:
    """A function that measures memory bandwidth in bytes/s: the median over half a second of
    readings of 512 MiB.

    On a CPU every core computes the dot product of its share with itself; elsewhere the first
    device computes one sum.
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
    """Bytes of one device's parameters that a decode step reads: all but the embeddings of which it
    reads single rows.
    """
    params = dict(sampler.params)
    params.pop("positions", None)
    if "head" in params:
        params.pop("embed")
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))


def measure(sampler: Sampler, batch: int, prompt: int = PROMPT, new: int = NEW) -> Rate:
    """The speed of one round: `batch` random prompts, each continued greedily by `new` tokens."""
    rng = np.random.default_rng(0)
    settings = SamplingParams(temperature=0, max_tokens=new)
    engine = sampler.engine(slots=batch, capacity=prompt + new, limits=EngineLimits())
    ids = rng.integers(0, sampler.vocab_size, (batch, prompt)).tolist()
    start = time.perf_counter()
    engine.submit(*(Request(one, settings, (), i) for i, one in enumerate(ids)))
    engine.step(1)
    first = time.perf_counter()
    count = sum(len(event.tokens) for event in engine.run())
    return Rate(first - start, count / (time.perf_counter() - first))


def report(model: LoadedModel, say: Callable[[str], None], rounds: int = 5) -> None:
    """Reports medians of `rounds` rounds, with least and most; an untimed round compiles.

    Bandwidth is measured before each round: on a shared machine it changes from second to second.
    """
    cfg, sampler = model.cfg, model.sampler(slots=max(BATCHES), consume=True)
    prompt = min(PROMPT, cfg.model.context // 2)
    new = min(NEW, cfg.model.context - prompt)
    size, memory = weight_bytes(sampler), memory_reader()
    say(
        f"{model.name}: {cfg.compute.dtype}, {size / 1e6:.0f} MB of weights a decode step; "
        f"prompt {prompt}, new {new}"
    )
    if sharding.platform() == "cpu" and (reason := cpu.why_not()):
        say(f"decode by XLA, which is slower than the C kernels: {reason}")
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
            f"weights read at {share:.0%} of the {statistics.median(reads) / 1e9:.1f} GB/s "
            f"({min(reads) / 1e9:.1f} to {max(reads) / 1e9:.1f}) memory bandwidth"
        )
