"""One result whatever the layout: every mesh, schedule, remat policy and backend trains alike.

The reference is one device, unrolled, with nothing recomputed or accumulated. Everything else is
compared with it over ten steps of AdamW, with dropout in part: each loss to 1e-5 and
each gradient norm to 1e-4, relative. `-s` prints the largest deviations by dimension.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from gptjax.checkpoint.checkpointer import leaves_by_path
from gptjax.config import Config, MoeConfig, validation
from gptjax.model import decoder
from gptjax.parallel import arrays, pipeline, sharding
from gptjax.parallel.mesh import make_mesh
from gptjax.training import objective
from gptjax.training.step import compile_step, create_state

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compile")]

STEPS = 10
EOS = 0
AXES = ("data", "stage", "fsdp", "expert", "context", "tensor")
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"positions": "learned", "dropout": 0.1},
    "llama": {"activation": "swiglu", "norm": "rmsnorm", "positions": "rope", "linear_bias": False},
    "wide heads": {
        "activation": "swiglu",
        "norm": "rmsnorm",
        "positions": "rope",
        "linear_bias": False,
        "embed": 128,
        "heads": 4,
        "kv_heads": 2,
        "layers": 4,
    },
    "window": {"positions": "alibi", "pattern": ("full", "window"), "window": 9, "kv_heads": 4},
    "moe": {
        "activation": "swiglu",
        "linear_bias": False,
        "positions": "rope",
        "moe": MoeConfig(experts=8, top_k=2, shared=1),
    },
    "capacity": {
        "activation": "swiglu",
        "linear_bias": False,
        "positions": "rope",
        "moe": MoeConfig(experts=8, top_k=2, capacity=1.25),
    },
}


def config_of(model: str, **sections: Any) -> Config:
    """Eight layers of width 32, and 32 packed rows of 32 tokens a step."""
    base = Config()
    shape = {"vocab_size": 128, "context": 32, "layers": 8, "embed": 32, "heads": 8, "mlp": 64}
    base = replace(
        base,
        model=replace(base.model, **{**shape, **MODELS[model]}),
        train=replace(base.train, seq_len=32, batch_tokens=1024, tokens=STEPS * 1024),
        data=replace(base.data, documents="mask"),
        optim=replace(base.optim, lr=1e-3, warmup_tokens=2048),
    )
    changed = {name: replace(getattr(base, name), **values) for name, values in sections.items()}
    return replace(base, **changed)


def batches(cfg: Config) -> Iterator[dict[str, np.ndarray]]:
    """Windows in which documents end, of which a few targets do not count.

    A mixture's all count: what its router adds to the loss is weighted by the targets of a part, so
    with uneven parts it hangs on the accumulation (in pre-training every part is whole).
    """
    least = 32 if cfg.model.moe.experts else 20
    rng = np.random.default_rng(0)
    for _ in range(STEPS):
        windows = rng.integers(1, 128, (32, 33)).astype(np.int32)
        windows[rng.random(windows.shape) < 0.08] = EOS
        yield {"windows_BW": windows, "lengths_B": rng.integers(least, 33, 32).astype(np.int32)}


def trained(cfg: Config, start: dict[str, np.ndarray] | None) -> tuple[list, dict]:
    """(loss, gradient norm) of each step, and the parameters begun with, in the model's order.

    `start` are those to begin with, fresh ones if None: initialising is compiled once.
    """
    devices = math.prod(size for size in vars(cfg.mesh).values() if isinstance(size, int))
    assert not list(validation.mesh_problems(cfg, cfg.mesh.shape(devices), 1))
    with jax.set_mesh(make_mesh(cfg.mesh, jax.devices()[:devices])):
        order = pipeline.order(cfg.model.layers // len(cfg.model.pattern), cfg.compute.rounds)
        create = lambda: create_state(cfg, lambda key: decoder.init(cfg.model, key))
        if start is None:
            state = jax.jit(create)()
            start = jax.device_get(leaves_by_path(state.params))
        else:
            abstract = sharding.abstract(create)

            def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                parameter = name.removeprefix("params/")
                value = start.get(parameter, np.zeros(leaf.shape, leaf.dtype))
                value = value[order] if parameter.startswith("blocks/") else value
                return jax.device_put(value, leaf.sharding)

            named = jax.tree_util.tree_map_with_path
            state = dataclasses.replace(
                named(place, abstract), params=named(place, abstract.params)
            )
        loss_fn = objective.training_loss(cfg, EOS)
        step = compile_step(cfg, loss_fn, state, objective.abstract_batch(cfg))
        seen = []
        for batch in batches(cfg):
            state, metrics = step(state, arrays.global_batch(batch, cfg.train.batch))
            seen.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return seen, start


@pytest.fixture(scope="module")
def references() -> dict[str, tuple[list, dict]]:
    """What one device makes of each model, as it is asked for."""
    return {}


@pytest.fixture(scope="module")
def deviations() -> Iterator[dict[str, tuple[float, float, int]]]:
    """The largest deviations of loss and gradient norm, and the number of runs, by dimension."""
    table: dict[str, tuple[float, float, int]] = {}
    yield table
    print("\n| dimension | runs | loss | gradient norm |\n|---|--:|--:|--:|")
    for name, (loss, norm, runs) in sorted(table.items()):
        print(f"| {name} | {runs} | {loss:.1e} | {norm:.1e} |")


def compare(references, deviations, cfg: Config, model: str, dimensions: list[str]) -> None:
    """Trains `cfg` and compares it with the reference of its model."""
    if model not in references:
        plain = {"scan_layers": False, "attention": "reference"}
        references[model] = trained(config_of(model, compute=plain, mesh={"data": 1}), None)
    expected, start = references[model]
    seen, _ = trained(cfg, start)
    worst = [
        max(abs(s[i] - e[i]) / abs(e[i]) for s, e in zip(seen, expected, strict=True))
        for i in (0, 1)
    ]
    for name in dimensions:
        loss, norm, runs = deviations.get(name, (0.0, 0.0, 0))
        deviations[name] = max(loss, worst[0]), max(norm, worst[1]), runs + 1
    assert expected[0][0] - expected[-1][0] > 0.01  # something is learnt
    assert worst[0] < 1e-5
    assert worst[1] < 1e-4


def meshes(axes: tuple[str, ...]) -> list[dict[str, int]]:
    """Every mesh of 2, 4 and 8 devices over these axes."""
    sizes = itertools.product((1, 2, 4, 8), repeat=len(axes))
    shapes = [dict(zip(axes, size, strict=True)) for size in sizes]
    return [shape for shape in shapes if math.prod(shape.values()) in (2, 4, 8)]


def split(mesh: dict[str, int]) -> frozenset[str]:
    """The axes that a mesh splits something over."""
    return frozenset(axis for axis, size in mesh.items() if size > 1)


def covering(shapes: list[dict[str, int]], sizes: dict[int, tuple[tuple[int, ...], ...]]):
    """Of the meshes, those with these sizes along so many split axes."""
    along = lambda mesh: tuple(size for size in mesh.values() if size > 1)
    return [mesh for mesh in shapes if along(mesh) in sizes.get(len(split(mesh)), ())]


def named(mesh: dict[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1)


ALL_DENSE = meshes(tuple(axis for axis in AXES if axis != "expert"))
ALL_MOE = [mesh for mesh in meshes(AXES) if mesh["expert"] > 1]
# Each axis alone, each pair and each triple of axes once; pairs on four devices, with dropout.
DENSE = covering(ALL_DENSE, {1: ((4,), (8,)), 2: ((2, 2),), 3: ((2, 2, 2),)})
MOE = [
    mesh
    for mesh in covering(ALL_MOE, {1: ((2,), (8,)), 2: ((4, 2), (2, 4)), 3: ((2, 2, 2),)})
    if len(split(mesh)) != 2 or mesh["expert"] == 4
]


EXHAUSTIVE = [pytest.mark.exhaustive]


def cases(chosen: list[dict[str, int]]) -> list[Any]:
    """Test cases; .ci/run has each axis alone on eight devices, and combinations among WAYS."""
    often = lambda mesh: 8 in mesh.values()
    return [
        pytest.param(mesh, id=named(mesh), marks=[] if often(mesh) else EXHAUSTIVE)
        for mesh in chosen
    ]


@pytest.mark.parametrize(("chosen", "every"), [(DENSE, ALL_DENSE), (MOE, ALL_MOE)])
def test_every_combination_of_axes_is_among_the_meshes(chosen, every) -> None:
    assert {split(mesh) for mesh in chosen} == {split(mesh) for mesh in every}


@pytest.mark.parametrize("mesh", cases(DENSE))
def test_a_mesh_trains_as_one_device(references, deviations, mesh) -> None:
    """With dropout on up to four devices; on eight without, which halves what is to compile."""
    model = "dense" if math.prod(mesh.values()) < 8 else "llama"
    cfg = config_of(model, mesh={"data": 1, **mesh})
    axes = [f"mesh.{axis}, {model}" for axis, size in mesh.items() if size > 1]
    compare(references, deviations, cfg, model, axes)


@pytest.mark.parametrize("mesh", cases(MOE))
def test_a_mesh_trains_a_mixture_as_one_device(references, deviations, mesh) -> None:
    cfg = config_of("moe", mesh={"data": 1, **mesh})
    axes = [f"mesh.{axis}, mixture" for axis, size in mesh.items() if size > 1]
    compare(references, deviations, cfg, "moe", axes)


WAYS: list[tuple[str, str, dict[str, Any]]] = [
    ("accumulation", "dense", {"train": {"accumulation": 4}, "mesh": {"fsdp": 4}}),
    ("remat", "dense", {"compute": {"remat": "dots"}, "mesh": {"fsdp": 2, "tensor": 2}}),
    ("remat", "moe", {"compute": {"remat": "block"}, "mesh": {"expert": 2, "tensor": 2}}),
    ("chunked loss", "dense", {"compute": {"loss_chunks": 8}}),
    ("chunked loss", "llama", {"compute": {"loss_chunks": 4}, "mesh": {"tensor": 2, "fsdp": 2}}),
    ("unrolled", "dense", {"compute": {"scan_layers": False}, "mesh": {"data": 2, "tensor": 4}}),
    ("attention blockwise", "llama", {"compute": {"attention": "blockwise"}, "mesh": {"fsdp": 8}}),
    (
        "attention native",
        "wide heads",
        {"compute": {"attention": "native"}, "mesh": {"tensor": 2, "fsdp": 4}},
    ),
    ("attention ring", "llama", {"compute": {"attention": "ring"}, "mesh": {"context": 8}}),
    (
        "attention ring",
        "llama",
        {"compute": {"attention": "ring"}, "mesh": {"context": 2, "stage": 2, "fsdp": 2}},
    ),
    ("attention reference", "window", {"compute": {"attention": "reference"}, "mesh": {"data": 8}}),
    ("capacity", "capacity", {"mesh": {"stage": 2, "expert": 4}}),
    (
        "rounds",
        "dense",
        {
            "compute": {"rounds": 2, "microbatches": 4, "remat": "block", "scan_layers": False},
            "mesh": {"stage": 2, "fsdp": 2, "tensor": 2},
            "train": {"accumulation": 2},
        },
    ),
    (
        "rounds",
        "moe",
        {"compute": {"rounds": 2, "remat": "dots"}, "mesh": {"stage": 2, "expert": 2}},
    ),
]
# Left to a person: more of the same kinds, on other meshes.
MORE_WAYS: list[tuple[str, str, dict[str, Any]]] = [
    ("scan", "dense", {}),
    ("accumulation", "dense", {"train": {"accumulation": 2}}),
    ("accumulation", "moe", {"train": {"accumulation": 4}, "mesh": {"expert": 2}}),
    ("remat", "dense", {"compute": {"remat": "block"}}),
    ("remat", "dense", {"compute": {"remat": "dots", "scan_layers": False}}),
    ("unrolled", "moe", {"compute": {"scan_layers": False}, "mesh": {"fsdp": 2, "expert": 4}}),
    ("attention blockwise", "llama", {"compute": {"attention": "blockwise"}}),
    (
        "attention ring",
        "llama",
        {"compute": {"attention": "ring", "remat": "block"}, "mesh": {"context": 4, "tensor": 2}},
    ),
    ("attention ring", "window", {"compute": {"attention": "ring"}, "mesh": {"context": 4}}),
    ("capacity", "capacity", {"mesh": {"fsdp": 2, "expert": 2, "tensor": 2}}),
    ("capacity", "capacity", {"train": {"accumulation": 4}}),
    ("rounds", "dense", {"compute": {"rounds": 2}, "mesh": {"stage": 4}}),
    ("rounds", "dense", {"compute": {"rounds": 4, "microbatches": 8}, "mesh": {"stage": 2}}),
    ("rounds", "window", {"compute": {"rounds": 2}, "mesh": {"stage": 2, "data": 4}}),
]


@pytest.mark.parametrize(
    ("what", "model", "sections"),
    [*WAYS, *(pytest.param(*way, marks=EXHAUSTIVE) for way in MORE_WAYS)],
)
def test_a_way_to_compute_changes_nothing(references, deviations, what, model, sections) -> None:
    sections = {**sections, "mesh": {"data": 1, **sections.get("mesh", {})}}
    compare(references, deviations, config_of(model, **sections), model, [what])


def test_another_model_is_told_apart(references) -> None:
    """The comparison can fail: a hundredth of a percent of dropout is seen."""
    compare(references, {}, config_of("dense", mesh={"data": 2}), "dense", [])
    other = config_of("dense", mesh={"data": 2})
    other = replace(other, model=replace(other.model, dropout=0.1001))
    with pytest.raises(AssertionError):
        compare(references, {}, other, "dense", [])
