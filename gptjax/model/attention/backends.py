"""Attention backends: the features that each declares, and the choice among them.

A backend is a subclass of `Backend`, registered by its name, which `compute.attention` gives:

    @ATTENTION_BACKENDS.register("flash")
    class Flash(LocalBackend):
        platforms = ("gpu",)
        features = frozenset({"window"})

        def attend_local(self, q_bThC, k_bTkC, v_bTkC, segments_bT, window, scale): ...

A backend is called only if it declares the features that the model and the batch need
(`Requirements`). It is an error to name a backend that lacks one, never a silent change of the
mathematics.

Shapes: B sequences, T positions, H query heads, K key heads, C head_dim; in lower case, one
device's share.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import jax

from gptjax.config import ModelConfig
from gptjax.config.registry import ATTENTION_BACKENDS
from gptjax.errors import ConfigError
from gptjax.model.layers import Tokens
from gptjax.parallel import sharding
from gptjax.runtime.hardware import Target


@dataclass(frozen=True)
class Requirements:
    """Features that a call of attention needs of its backend, beyond causal masking."""

    segments: bool = False
    """Packed documents, each masked from the others."""
    window: bool = False
    grouped: bool = False
    """Fewer key heads than query heads."""
    alibi: bool = False
    soft_cap: bool = False
    dropout: bool = False
    context: bool = False
    """Sequences split over devices."""

    def names(self) -> list[str]:
        """Names of the features that are needed."""
        return [name for name, needed in vars(self).items() if needed]


@dataclass(frozen=True)
class Sizes:
    """The compute dtype, the length of one device's part of a sequence, and the width of a head."""

    dtype: str
    length: int
    head: int = 64


@dataclass(frozen=True)
class Inputs:
    """Inputs of attention over whole sequences in zigzag order (parallel/sequence.py).

    scale: the factor on products of queries and keys. window: keys that a query sees, its own
    included; None for all. Query head h reads key head h // (H/K).
    """

    q_BTHC: jax.Array
    k_BTKC: jax.Array
    v_BTKC: jax.Array
    tokens: Tokens
    scale: float
    window: int | None = None
    dropout_id: jax.Array | int = 0


class Backend(ABC):
    """An implementation of causal attention. Subclasses declare where it runs and its features."""

    platforms: ClassVar[tuple[str, ...]]
    """Among "cpu", "gpu" and "tpu"."""
    features: ClassVar[frozenset[str]] = frozenset()
    """Names of the fields of `Requirements` that it supports."""
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16")
    length_multiple: ClassVar[int] = 1
    """Divides a device's part of a sequence."""
    head_multiple: ClassVar[int] = 1
    """Divides the width of a head."""
    requires_context: ClassVar[bool] = False
    """Whether it is only for sequences that are split over devices."""
    auto_rank: ClassVar[int | None] = None
    """Its place among those that compute.attention=auto tries, lowest first; None: not tried."""

    @abstractmethod
    def attend(self, cfg: ModelConfig, inputs: Inputs) -> jax.Array:
        """Causal attention, [B, T, H, C]."""

    def refusal(self, need: Requirements, sizes: Sizes, target: Target) -> str | None:
        """The reason why it cannot serve a call, or None if it can."""
        missing = [feature for feature in need.names() if feature not in self.features]
        if target.platform not in self.platforms:
            return f"needs a {'/'.join(self.platforms)}"
        if missing:
            return f"does not support {', '.join(missing)}"
        if self.requires_context and not need.context:
            return "needs mesh.context of at least 2"
        if sizes.dtype not in self.dtypes:
            return f"needs compute.dtype={'/'.join(self.dtypes)}"
        if sizes.length % self.length_multiple:
            return f"needs sequences of a multiple of {self.length_multiple}, not {sizes.length}"
        if sizes.head % self.head_multiple:
            return f"needs heads of a multiple of {self.head_multiple}, not {sizes.head}"
        return None


class LocalBackend(Backend):
    """A backend that is called on one device's share of sequences and heads."""

    @abstractmethod
    def attend_local(
        self,
        q_bThC: jax.Array,
        k_bTkC: jax.Array,
        v_bTkC: jax.Array,
        segments_bT: jax.Array | None,
        window: int | None,
        scale: float,
    ) -> jax.Array:
        """Causal attention on one device's share, [b, T, h, C]."""

    def attend(self, cfg: ModelConfig, inputs: Inputs) -> jax.Array:
        """Calls `attend_local` on each device."""
        heads = sharding.spec("batch", "seq", "heads", None)
        segments_BT = inputs.tokens.segments_BT
        return jax.shard_map(
            lambda q, k, v, segments: self.attend_local(
                q, k, v, segments, inputs.window, inputs.scale
            ),
            in_specs=(
                heads,
                heads,
                heads,
                None if segments_BT is None else sharding.spec("batch", "seq"),
            ),
            out_specs=heads,
            check_vma=False,
        )(inputs.q_BTHC, inputs.k_BTKC, inputs.v_BTKC, segments_BT)


def choose(wanted: str, need: Requirements, sizes: Sizes, target: Target) -> str:
    """The name of the backend to use in a program for this target.

    `wanted` is compute.attention; "auto" takes the first by `auto_rank` that can serve the call.
    Raises ConfigError where a named backend is unknown or cannot serve it.
    """
    if wanted != "auto":
        if why := backend(wanted).refusal(need, sizes, target):
            raise ConfigError([f"compute.attention={wanted}: {why}; use auto or reference"])
        return wanted
    return next(name for name in _ranked() if not backend(name).refusal(need, sizes, target))


def refusals(need: Requirements, sizes: Sizes, target: Target) -> dict[str, str]:
    """Why a call is not served by the backends that compute.attention=auto tries on a platform."""
    tried = ((name, backend(name)) for name in _ranked())
    return {
        name: why
        for name, one in tried
        if target.platform in one.platforms and (need.context or not one.requires_context)
        if (why := one.refusal(need, sizes, target))
    }


def _ranked() -> list[str]:
    """Names of the backends that compute.attention=auto tries, in this order."""
    ranks = {name: backend(name).auto_rank for name in ATTENTION_BACKENDS.names()}
    tried = sorted((rank, name) for name, rank in ranks.items() if rank is not None)
    return [name for _, name in tried]


def backend(name: str) -> Backend:
    """The backend of a name. Raises ConfigError for an unknown one."""
    return ATTENTION_BACKENDS[name]()


def attend(cfg: ModelConfig, inputs: Inputs, *, backend_name: str) -> jax.Array:
    """Causal attention by the named backend, [B, T, H, C].

    Weights are dropped if the tokens have keys.
    """
    return backend(backend_name).attend(cfg, inputs)
