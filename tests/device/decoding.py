"""Greedy tokens as on the CPU, and tokens/s of decoding."""

from typing import Any

import jax
import numpy as np
from rows import Rows
from workloads import changed, tiny

from gptjax.cli import benchmark
from gptjax.config import Config, load
from gptjax.model import decoder
from gptjax.parallel import sharding
from gptjax.parallel.mesh import entered_mesh, make_mesh
from gptjax.sample import Sampler, SamplingParams

PROMPT, NEW = 64, 128
BATCHES = (1, 8, 64)


def llama(*, toy: bool) -> Config:
    """The Llama that is timed: 1.2 billion parameters in bfloat16."""
    if toy:
        return tiny("llama", dtype="bfloat16")
    return changed(load("llama:llama32_1b"), compute={"dtype": "bfloat16"})


def greedy(cfg: Config, params: Any, device: jax.Device, prompts: list[list[int]]) -> list[Any]:
    """The ids of each prompt's greedy continuation."""
    jax.config.update("jax_default_matmul_precision", "float32")
    with jax.set_mesh(make_mesh(cfg.mesh, [device])):
        layout = sharding.abstract(lambda: decoder.init(cfg.model, jax.random.key(0)))
        placed = jax.tree.map(lambda a, like: jax.device_put(a, like.sharding), params, layout)
        sampler = Sampler(placed, cfg.model, cfg.compute, stop_ids=())
        settings = SamplingParams(temperature=0, max_tokens=32)
        return [one.ids for one in sampler.generate(prompts, settings)]


def run(rows: Rows, *, toy: bool) -> None:
    cfg = tiny("llama", dtype="float32")
    draw = lambda: decoder.init(cfg.model, jax.random.key(3))
    with jax.set_mesh(make_mesh(cfg.mesh, jax.devices("cpu")[:1])):
        params = jax.device_get(jax.jit(draw)())
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, cfg.model.vocab_size, n).tolist() for n in (1, 5, 40, 100)]
    wanted = greedy(cfg, params, jax.devices("cpu")[0], prompts)
    found = greedy(cfg, params, jax.devices()[0], prompts)
    unlike = sum(a != b for a, b in zip(found, wanted, strict=True))
    rows.add("greedy continuations unlike the CPU's, of 4", unlike, bound=0)

    cfg = llama(toy=toy)
    with entered_mesh(cfg):
        params = jax.jit(lambda: decoder.init(cfg.model, jax.random.key(0)))()
        sampler = Sampler(params, cfg.model, cfg.compute, stop_ids=())
        del params
        for batch in BATCHES[:1] if toy else BATCHES:
            benchmark.measure(sampler, batch, PROMPT, NEW)  # compiles
            rate = benchmark.measure(sampler, batch, PROMPT, NEW)
            rows.add(f"gptjax, {batch} sequences: decoding", rate.decode, "tokens/s")
            rows.add(f"gptjax, {batch} sequences: first tokens", rate.first * 1000, "ms")
