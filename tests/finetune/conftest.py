"""A run to begin from, with bytes for tokens, and a labelled task that is learnt in a moment."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoint import run_dir
from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.config import CheckpointConfig, Config, LogConfig, ModelConfig, TokenizerConfig
from gptjax.parallel import mesh
from gptjax.tokenizer import ByteTokenizer, Tokenizer

Write = Callable[[str, Sequence[Any]], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes objects, or texts as they are, a line each."""

    def lines(name: str, records: Sequence[Any]) -> Path:
        text = lambda one: one if isinstance(one, str) else json.dumps(one)
        (tmp_path / name).write_text("".join(f"{text(one)}\n" for one in records))
        return tmp_path / name

    return lines


def labelled(count: int, seed: int, labels: Sequence[Any] = ("low", "high")) -> list[dict]:
    """Texts of small letters or of capitals."""
    rng = np.random.default_rng(seed)
    texts = ["".join(map(chr, rng.integers(97, 123, 3 + i % 9))) for i in range(count)]
    return [
        {"text": t.upper() if i % 2 else t, "label": labels[i % 2]} for i, t in enumerate(texts)
    ]


@pytest.fixture(scope="session")
def make_base(random_params) -> Callable[..., str]:
    """Saves a tiny model with random parameters as a run, in this folder."""

    def make(folder: Path, tokenizer: Tokenizer | None = None, **fields: Any) -> str:
        tokenizer = tokenizer or ByteTokenizer()
        tiny = ModelConfig(vocab_size=258, context=48, layers=2, embed=32, heads=4)
        cfg = replace(
            Config(),
            run=str(folder),
            model=replace(tiny, **fields),
            tokenizer=TokenizerConfig(kind=tokenizer.kind),
            log=LogConfig(tensorboard=False, every=1, compile_cache=""),
            eval=replace(Config().eval, sample_tokens=8),
        )
        folder.mkdir(parents=True)
        source = {"folder": "nowhere", "config": {}, "dtypes": {}}
        run_dir.record_imported(cfg, tokenizer, source)
        with (
            mesh.entered_mesh(cfg),
            Checkpointer(folder / run_dir.CHECKPOINTS, CheckpointConfig()) as c,
        ):
            c.save(0, {"step": jnp.int32(0), "params": random_params(cfg.model, 0.1)})
            c.finish()
        return str(folder)

    return make


@pytest.fixture(scope="session")
def base(make_base, tmp_path_factory) -> str:
    """A run of a tiny model."""
    return make_base(tmp_path_factory.mktemp("base") / "base")
