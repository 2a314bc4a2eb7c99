"""The attention backends: what each supports, and the choice among them.

A backend is asked for exactly what the model and the batch need (`Requirements`). One that does not declare
a feature is never handed it: `choose` takes the fastest that fits, and a backend that the
configuration names but that does not fit is an error, never a silent change of the mathematics.

Shapes: B batch, T queries, S keys, H query heads, K key heads, R = H/K queries of a group,
C head_dim.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptjax.config import ModelConfig
from gptjax.errors import ConfigError
from gptjax.model import layers
from gptjax.model.attention import ring, vendor
from gptjax.model.attention.blockwise import blockwise
from gptjax.model.attention.reference import reference_attention
from gptjax.parallel import sequence, sharding


@dataclass(frozen=True)
class Requirements:
    """What one call of attention needs of its backend, beyond causal masking."""

    segments: bool = False
    window: bool = False
    grouped: bool = False
    alibi: bool = False
    soft_cap: bool = False
    dropout: bool = False
    context: bool = False  # sequences split over devices

    def names(self) -> list[str]:
        """The features that are needed."""
        return [name for name, wanted in vars(self).items() if wanted]


@dataclass(frozen=True)
class Sizes:
    """What else a backend may be particular about."""

    dtype: str
    length: int
    head: int = 64


@dataclass(frozen=True)
class Backend:
    """An implementation, where it runs, and which features of `Requirements` it has.

    If `local`, `attend(q_BTHC, k_BTKC, v_BTKC, segments_BT, window)` is called on one device's
    share, otherwise `attend(cfg, q_BTHC, k_BTKC, v_BTKC, positions_BT, segments_BT, window)` on
    whole arrays. `dtypes` are those that it takes, `length_unit` what divides a device's part of a
    sequence, `head_limit` its widest head; if `split`, it is for a context axis alone.
    """

    attend: Callable[..., jax.Array] | None
    platforms: tuple[str, ...]
    features: frozenset[str]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    length_unit: int = 1
    head_limit: int = 2**31
    local: bool = True
    split: bool = False

    def refusal(self, need: Requirements, sizes: Sizes, platform: str) -> str | None:
        """Why it cannot serve a call, or None if it can."""
        missing = [feature for feature in need.names() if feature not in self.features]
        if platform not in self.platforms:
            return f"needs a {'/'.join(self.platforms)}"
        if missing:
            return f"does not support {', '.join(missing)}"
        if self.split and not need.context:
            return "needs mesh.context of at least 2"
        if sizes.dtype not in self.dtypes:
            return f"needs compute.dtype={'/'.join(self.dtypes)}"
        if sizes.length % self.length_unit:
            return f"needs sequences of a multiple of {self.length_unit}, not {sizes.length}"
        if sizes.head > self.head_limit:
            return f"needs heads of at most {self.head_limit}, not {sizes.head}"
        return None


BACKENDS: dict[str, Backend] = {  # fastest first, for each platform
    "splash": Backend(
        vendor.splash,
        ("tpu",),
        frozenset({"segments", "window", "grouped", "soft_cap", "context"}),
        length_unit=128,
        local=False,
    ),
    "cudnn": Backend(
        vendor.cudnn, ("gpu",), frozenset({"window", "grouped"}), ("bfloat16",), head_limit=128
    ),
    "blockwise": Backend(blockwise, ("cpu",), frozenset({"segments", "window", "grouped"})),
    "ring": Backend(
        ring.attend,
        ("cpu", "gpu", "tpu"),
        frozenset({"segments", "window", "grouped", "alibi", "soft_cap", "context"}),
        local=False,
        split=True,
    ),
    "reference": Backend(
        None,
        ("cpu", "gpu", "tpu"),
        frozenset({"segments", "window", "grouped", "alibi", "soft_cap", "dropout", "context"}),
    ),
}


def choose(wanted: str, need: Requirements, sizes: Sizes, platform: str) -> str:
    """The backend to use on a platform ("cpu", "gpu", "tpu").

    "auto" takes the first that can serve the call. Raises ConfigError where the one that the
    configuration names cannot.
    """
    for name, backend in BACKENDS.items():
        why = backend.refusal(need, sizes, platform)
        if wanted == name and why:
            raise ConfigError([f"compute.attention={name}: {why}; use auto or reference"])
        if wanted in (name, "auto") and not why:
            return name
    raise AssertionError("the reference backend has every feature")


def attend(
    cfg: ModelConfig,
    q_BTHC: jax.Array,
    k_BTKC: jax.Array,
    v_BTKC: jax.Array,
    positions_BT: jax.Array,
    *,
    backend: str,
    segments_BT: jax.Array | None = None,
    window: int | None = None,
    keys_BT2: jax.Array | None = None,
    site: jax.Array | int = 0,
) -> jax.Array:
    """Causal attention over whole sequences by the named backend, [B, T, H, C].

    With `keys_BT2`, keys of each place (`layers.place_keys`), weights are dropped at `site`.
    """
    chosen = BACKENDS[backend]
    if chosen.attend is None:
        drop = functools.partial(_drop, cfg, keys_BT2, site)
        return reference_attention(
            cfg, q_BTHC, k_BTKC, v_BTKC, positions_BT, segments_BT, window, drop
        )
    if not chosen.local:
        return chosen.attend(cfg, q_BTHC, k_BTKC, v_BTKC, positions_BT, segments_BT, window)
    heads = sharding.spec("batch", "seq", "heads", None)
    rows = sharding.spec("batch", "seq")
    local: Any = lambda q, k, v, segments: chosen.attend(q, k, v, segments, window)
    return jax.shard_map(
        local,
        in_specs=(heads, heads, heads, None if segments_BT is None else rows),
        out_specs=heads,
        check_vma=False,
    )(q_BTHC, k_BTKC, v_BTKC, segments_BT)


def _drop(cfg, keys_BT2, site, p_BKRTS):
    """Dropout of attention weights; a query's key, and the head, decide."""
    if keys_BT2 is None or cfg.dropout == 0:
        return p_BKRTS
    places = sequence.places(p_BKRTS.shape[-1])
    whole = sharding.spec("batch", None, None)
    heads = sharding.spec("batch", "heads", None, None, None)

    def local(p_bkrTS, keys_bT2, site):
        b, k, r, t, s = p_bkrTS.shape
        first = lax.axis_index(sharding.RULES["heads"]) * k * r
        fold = lambda key_2, head: jax.random.key_data(
            jax.random.fold_in(jax.random.wrap_key_data(key_2), head)
        )
        by_head = jax.vmap(jax.vmap(fold, (0, None)), (None, 0))
        keys_hN2 = by_head(keys_bT2.reshape(b * t, 2), first + jnp.arange(k * r))
        keys_bhT2 = keys_hN2.reshape(k * r, b, t, 2).swapaxes(0, 1)
        # Weights of keys in their own order, as the context axis does not have them.
        in_order = p_bkrTS[..., np.argsort(places)].reshape(b, k * r, t, s)
        return layers.dropped(in_order, cfg.dropout, keys_bhT2, site)[..., places].reshape(
            p_bkrTS.shape
        )

    return jax.shard_map(local, in_specs=(heads, whole, jax.P()), out_specs=heads, check_vma=False)(
        p_BKRTS, jax.sharding.reshard(keys_BT2, whole), jnp.uint32(site)
    )
