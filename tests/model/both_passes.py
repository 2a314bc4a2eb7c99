"""Helpers of several test files: attention by a backend on a mesh, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig
from gptjax.model import layers
from gptjax.model.attention import backends
from gptjax.model.layers import Tokens
from gptjax.parallel import sequence
from gptjax.parallel.sharding import spec

HEAD = 8


def make(length, heads=4, kv_heads=4, batch=2, head=HEAD, dtype=jnp.float32):
    """q, k, v and a cotangent."""
    rng = np.random.default_rng(length)
    return [
        rng.normal(size=(batch, length, n, head)).astype(dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    ]


def segments_of(length, batch=2):
    """Segments of documents of uneven lengths, different in each sequence."""
    borders = np.random.default_rng(length).random((batch, length)) < 8 / length
    return np.cumsum(borders, 1).astype(np.int32)


def placed(array, *logical):
    """An array on the ambient mesh, split by its logical axes."""
    return jax.device_put(array, jax.NamedSharding(jax.sharding.get_mesh(), spec(*logical)))


def both_passes(function, q, k, v, do):
    """The output, and gradients of q, k, v."""

    def run(q, k, v, do):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(do)

    return jax.device_get(jax.jit(run)(q, k, v, do))


def attend_on(mesh, arrays, backend, segments=None, where=None, seed=None, window=None, **fields):
    """The output and gradients of a backend on a mesh, in natural order.

    `where` are the tokens' positions, if not 0, 1, …; with `seed` weights are dropped; `fields` are
    the model's.
    """
    batch, length, heads, head = arrays[0].shape
    cfg = ModelConfig(heads=heads, kv_heads=arrays[1].shape[2], head_dim=head, **fields)
    with mesh as entered:
        order = sequence.zigzag_positions(length)
        arrays = [placed(a[:, order], "batch", "seq", "heads", None) for a in arrays]
        if segments is not None:
            segments = placed(segments[:, order], "batch", "seq")
        assert len({str(s.index) for s in arrays[0].addressable_shards}) == entered.size
        where = np.broadcast_to(np.arange(length), (batch, length)) if where is None else where
        positions = placed(where[:, order], "batch", "seq")

        keys = None
        if seed is not None:
            keys_B2 = jax.random.key_data(jax.random.split(jax.random.key(seed), batch))
            keys = layers.position_keys(placed(keys_B2, "batch", None), length)
            keys = placed(jax.device_get(keys)[:, order], "batch", "seq", None)

        tokens = Tokens(positions, segments, keys)

        def attend(q, k, v):
            inputs = backends.Inputs(q, k, v, tokens, cfg.attention_scale, window)
            return backends.attend(cfg, inputs, backend_name=backend)

        return [part[:, np.argsort(order)] for part in both_passes(attend, *arrays)]


def assert_same(got, want, tolerance=1e-5):
    for part, g, w in zip(("out", "dq", "dk", "dv"), got, want, strict=False):
        assert g.dtype == w.dtype
        np.testing.assert_allclose(
            np.float32(g), np.float32(w), atol=tolerance, rtol=tolerance, err_msg=part
        )
