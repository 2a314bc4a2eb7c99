"""Tensors of another layout and the parameters of ours that they hold: split, and joined again.

Shapes: D embed, H query heads, K key heads, R = H/K, C head_dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptjax.config import ModelConfig


@dataclass(frozen=True)
class TensorMapping:
    """One tensor of theirs and the parameters of ours that it holds.

    `name` may have {i}, the layer, and {e}, the expert; `paths` are below the layer's part of the
    tree, or of the whole tree. `split` gives the parameters of a tensor, `join` the reverse.
    """

    name: str
    paths: tuple[str, ...]
    split: Callable[[np.ndarray], Sequence[np.ndarray]]
    join: Callable[..., np.ndarray]

    @property
    def in_layer(self) -> bool:
        """Whether there is one for every layer."""
        return "{i}" in self.name


def one(name: str, path: str, split: Any, join: Any) -> TensorMapping:
    """A tensor that holds one parameter."""
    return TensorMapping(name, (path,), lambda t: [split(t)], join)


def vector(name: str, path: str, shape: tuple[int, ...] = (-1,)) -> TensorMapping:
    """A bias or a scale, in our shape."""
    return one(name, path, lambda t: t.reshape(shape), lambda x: x.reshape(-1))


def matrix(
    name: str, path: str, shape: tuple[int, ...], *, inputs: int = 1, **kind: bool
) -> TensorMapping:
    """A linear layer; theirs is [out, in] as PyTorch's, or [in, out] with conv1d=True."""
    turn = (lambda t: t) if kind.get("conv1d") else np.transpose
    flat = (int(np.prod(shape[:inputs])), -1)
    return one(name, path, lambda t: turn(t).reshape(shape), lambda x: turn(x.reshape(flat)))


def table(name: str, path: str, cfg: ModelConfig) -> TensorMapping:
    """An embedding table, which ours fills up with rows of zeros."""
    extra = cfg.table - cfg.vocab_size
    return one(name, path, lambda t: np.pad(t, ((0, extra), (0, 0))), lambda x: x[: cfg.vocab_size])


def grouped_qkv(name: str, cfg: ModelConfig, suffix: str = "") -> TensorMapping:
    """Queries, keys and values in one tensor, [K, R + 2, C] on the output side: per group of heads
    its R queries, one key and one value."""
    k, r, c = cfg.kv, cfg.heads // cfg.kv, cfg.head
    paths = tuple(f"attn/{p}{suffix}" for p in "qkv")

    def split(t: np.ndarray) -> list[np.ndarray]:
        groups = t.reshape(k, r + 2, c, -1)
        parts = groups[:, :r], groups[:, r : r + 1], groups[:, r + 1 :]
        heads = [p.reshape(-1, c, p.shape[-1]) for p in parts]
        return [h[..., 0] if suffix else h.transpose(2, 0, 1) for h in heads]

    def join(*parts: np.ndarray) -> np.ndarray:
        heads = [p[..., None] if suffix else p.transpose(1, 2, 0) for p in parts]
        groups = [h.reshape(k, -1, c, h.shape[-1]) for h in heads]
        flat = np.concatenate(groups, 1).reshape((r + 2) * k * c, -1)
        return flat[:, 0] if suffix else flat

    return TensorMapping(name, paths, split, join)


def concatenated_qkv(name: str, cfg: ModelConfig, suffix: str = "") -> TensorMapping:
    """All queries, then all keys, then all values, on the last axis of [in, out]."""
    shape = (cfg.heads, cfg.head) if suffix else (cfg.embed, cfg.heads, cfg.head)
    paths = tuple(f"attn/{p}{suffix}" for p in "qkv")
    return TensorMapping(
        name,
        paths,
        lambda t: [part.reshape(shape) for part in np.split(t, 3, -1)],
        lambda *parts: np.concatenate([p.reshape(*shape[:-2], -1) for p in parts], -1),
    )


def norm(theirs: str, ours: str, cfg: ModelConfig) -> list[TensorMapping]:
    """Scale and perhaps bias of a normalisation."""
    pieces = [vector(f"{theirs}.weight", f"{ours}/scale")]
    if cfg.norm == "layernorm" and cfg.norm_bias:
        pieces.append(vector(f"{theirs}.bias", f"{ours}/bias"))
    return pieces
