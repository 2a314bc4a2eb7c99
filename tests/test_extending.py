"""Extensions from outside the package: each is one registered class, named in a configuration.

A toy optimizer, attention backend, metric writer and data source train a tiny model together, by
the public API, as an extension's own preset would have them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import gptjax
from gptjax.config import Config, DataConfig, TokenizerConfig
from gptjax.config.registry import (
    ATTENTION_BACKENDS,
    DATA_SOURCES,
    METRIC_WRITERS,
    OPTIMIZERS,
    Registry,
)
from gptjax.data.files import Counts, Document
from gptjax.errors import ConfigError
from gptjax.model.attention.backends import LocalBackend
from gptjax.plan import estimate, machines
from gptjax.training.optimizer import UpdateRule

pytestmark = pytest.mark.usefixtures("quick_compile")

CALLS: dict[str, list[Any]] = {"attention": [], "metrics": [], "closed": []}


@OPTIMIZERS.register("toy_sgd")
class ToySgd(UpdateRule):
    """Plain gradient descent."""

    moments = 0

    def build(self, cfg: Config) -> optax.GradientTransformation:
        return optax.identity()


@ATTENTION_BACKENDS.register("toy_mean")
class ToyMean(LocalBackend):
    """The mean of the values so far: attention without scores."""

    platforms = ("cpu",)
    features = frozenset({"grouped"})

    def attend_local(self, q_bthc, k_btkc, v_btkc, segments_bt, window, scale):
        CALLS["attention"].append(q_bthc.shape)
        count_t = jnp.arange(1, q_bthc.shape[1] + 1, dtype=v_btkc.dtype)
        mean_btkc = jnp.cumsum(v_btkc, axis=1) / count_t[None, :, None, None]
        return jnp.repeat(mean_btkc, q_bthc.shape[2] // v_btkc.shape[2], axis=2)


@METRIC_WRITERS.register("toy_list")
class ToyWriter:
    """Keeps metrics in memory."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self.folder = folder

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        CALLS["metrics"].append((step, dict(metrics)))

    def close(self) -> None:
        CALLS["closed"].append(self.folder.name)


@dataclass(frozen=True)
class Countdown:
    """Documents that count down from a number."""

    first: int

    @property
    def name(self) -> str:
        return f"toy:{self.first}"

    def size_bytes(self) -> int:
        return 100 * self.first

    def documents(self, cfg: DataConfig, counts: Counts) -> Iterator[Document]:
        for n in range(self.first, 0, -1):
            yield Document(f"{self.name}/{n}", " ".join(str(i) for i in range(n, 0, -1)))


@DATA_SOURCES.register("toy")
def toy_sources(rest: str) -> Sequence[Countdown]:
    return [Countdown(int(rest))]


def toy_config(folder: Path) -> Config:
    cfg = gptjax.Config(run=str(folder / "run"))
    return replace(
        cfg,
        model=replace(cfg.model, vocab_size=258, context=32, layers=2, embed=32, heads=4),
        tokenizer=TokenizerConfig(kind="bytes"),
        data=replace(
            cfg.data, sources=("toy:60",), store=str(folder / "store"), valid_fraction=0.2
        ),
        optim=replace(cfg.optim, name="toy_sgd", lr=0.5, warmup_tokens=0, weight_decay=0.0),
        compute=replace(cfg.compute, attention="toy_mean"),
        train=replace(cfg.train, tokens=4 * 256, batch_tokens=256, seq_len=32),
        eval=replace(cfg.eval, batch=8, every=0, prompts=("9 8",), sample_tokens=4),
        log=replace(cfg.log, every=1, tensorboard=False, writers=("toy_list",), compile_cache=""),
    )


@pytest.mark.slow
def test_a_toy_optimizer_backend_writer_and_source_train_together(tmp_path) -> None:
    cfg = toy_config(tmp_path)
    results = gptjax.train(cfg)
    assert results["valid_loss"] > 0
    assert CALLS["attention"]
    steps = [step for step, metrics in CALLS["metrics"] if "loss" in metrics]
    assert steps == [1, 2, 3, 4]
    assert CALLS["closed"] == ["run"]
    with gptjax.load(cfg.run) as model:
        # Gradient descent has no state: a step's checkpoint holds parameters and counters alone.
        assert model.step == 4
        (leaf,) = {leaf.dtype for leaf in jax.tree.leaves(model.params)}
        assert leaf == jnp.float32


def test_the_planner_reads_an_optimizers_own_declaration() -> None:
    cfg = gptjax.Config()
    cfg = replace(cfg, train=replace(cfg.train, batch_tokens=64 * cfg.train.seq_len))
    machine = machines.parse("v5e:4x4")
    seconds = {}
    for name in ("toy_sgd", "lion", "adamw"):
        plan = estimate.plan(replace(cfg, optim=replace(cfg.optim, name=name)), machine)
        seconds[name] = plan.times.update
    assert seconds["toy_sgd"] < seconds["lion"] < seconds["adamw"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("optim", {"name": "sgdd"}), r"optim\.name=sgdd: unknown; known: adamw, .*toy_sgd"),
        (("compute", {"attention": "flash"}), r"compute\.attention=flash: unknown; known: splash"),
        (
            ("log", {"writers": ("carrier-pigeon",)}),
            r"log\.writers=carrier-pigeon: unknown; known: jsonl",
        ),
    ],
)
def test_a_name_that_is_not_registered_is_refused_with_the_known_ones(change, message) -> None:
    section, fields = change
    cfg = gptjax.Config()
    cfg = replace(cfg, **{section: replace(getattr(cfg, section), **fields)})
    with pytest.raises(ConfigError, match=message):
        cfg.check()


def test_a_registered_name_cannot_be_taken_again() -> None:
    with pytest.raises(ValueError, match=r"optim\.name=toy_sgd: this name is registered already"):
        OPTIMIZERS.register("toy_sgd")(type("Other", (), {}))
    with pytest.raises(ValueError, match=r"optim\.name=adamw"):
        OPTIMIZERS.register("adamw")(type("Other", (), {}))
    fresh = Registry("optim.name", {})
    assert fresh.register("toy_sgd")(ToySgd) is ToySgd
    assert fresh["toy_sgd"] is ToySgd
