"""Ring attention whose blocks are computed by cuDNN's flash attention, for GPUs.

The ring and its schedule are those of ring.py, with two blocks a device: its early and its late
chunk. Of the pairs of blocks that a step computes, only a device's own pairs on the diagonal have a
causal mask; all others are whole squares, which cuDNN computes with no mask but that of documents.

A forward pass over one block of keys gives its output and the log-sum-exp of its scores; outputs
are merged by these (Dao et al. 2022; as in Liu et al. 2023). A backward pass over one block of
keys, given the merged output and log-sum-exp, gives that block's part of the gradients.

Shapes: as in ring.py, but for the queries: n blocks of S tokens, b sequences, h query heads, k key
heads, C head_dim: [n, b, h, S, C], cuDNN's layout BNTH.
"""

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from gptjax.config import ModelConfig
from gptjax.config.registry import ATTENTION_BACKENDS
from gptjax.model.attention import ring
from gptjax.model.attention.backends import Inputs
from gptjax.model.attention.ring import Blocks
from gptjax.model.attention.vendor import Cudnn
from gptjax.parallel import sharding

_LAYOUT = "BNTH"


@ATTENTION_BACKENDS.register("cudnn_ring")
class CudnnRing(Cudnn):
    """Ring attention over the context axis, by cuDNN's kernels."""

    features = frozenset({"segments", "grouped", "context"})
    length_multiple = 4  # two chunks of even lengths
    requires_context = True
    auto_rank = 30

    def attend(self, cfg: ModelConfig, inputs: Inputs) -> jax.Array:
        """Causal attention, [B, T, H, C]."""
        heads, segments_BT = sharding.spec("batch", "seq", "heads", None), inputs.tokens.segments_BT
        tokens = None if segments_BT is None else sharding.spec("batch", "seq")
        return jax.shard_map(
            functools.partial(_ring, inputs.scale),
            in_specs=(heads, heads, heads, tokens),
            out_specs=heads,
            check_vma=False,
        )(inputs.q_BTHC, inputs.k_BTKC, inputs.v_BTKC, segments_BT)


# --- the two passes ------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(
    scale: float,
    q_bthC: jax.Array,
    k_btkC: jax.Array,
    v_btkC: jax.Array,
    segments_bt: jax.Array | None,
) -> jax.Array:
    return _ring_fwd(scale, q_bthC, k_btkC, v_btkC, segments_bt)[0]


def _ring_fwd(
    scale: float,
    q_bthC: jax.Array,
    k_btkC: jax.Array,
    v_btkC: jax.Array,
    segments_bt: jax.Array | None,
) -> tuple[jax.Array, Any]:
    keys = ring.key_blocks(k_btkC, v_btkC, segments_bt, blocks=2)
    q_nbhSC = _query_blocks(q_bthC)

    def diagonal(queries: Blocks, keys: Blocks) -> tuple[Any, Any]:
        query, key = _as_sequences(queries), _as_sequences(keys)
        out, lse = forward(query.arrays, key.arrays, _seen(query, key), scale, causal=True)
        blocks = lambda x: x.reshape(2, -1, *x.shape[1:]).astype(jnp.float32)
        return (blocks(out), blocks(lse)), ()

    def update(query: Blocks, key: Blocks, acc: Any) -> Any:
        """The output and log-sum-exp over more keys."""
        (out_bhSC, lse_bhS), _ = acc
        more, more_lse = forward(query.arrays, key.arrays, _seen(query, key), scale)
        lse = jnp.logaddexp(lse_bhS, more_lse)
        share = lambda one_bhS: jnp.exp(one_bhS - lse)[..., None]
        return (out_bhSC * share(lse_bhS) + more * share(more_lse), lse), ()

    (out_nbhSC, lse_nbhS), _ = ring.ring_pass(update, None, q_nbhSC, keys, diagonal=diagonal)
    out_bthC = ring.kept(_from_query_blocks(out_nbhSC).astype(q_bthC.dtype))
    return out_bthC, (q_bthC, k_btkC, v_btkC, segments_bt, out_bthC, ring.kept(lse_nbhS))


def _ring_bwd(
    scale: float, residuals: Any, do_bthC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q_bthC, k_btkC, v_btkC, segments_bt, out_bthC, lse_nbhS = residuals
    keys = ring.key_blocks(k_btkC, v_btkC, segments_bt, blocks=2)
    q_nbhSC, out_nbhSC, do_nbhSC = map(_query_blocks, (q_bthC, out_bthC, do_bthC))
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def diagonal(queries: Blocks, keys: Blocks) -> tuple[Any, Any]:
        query, key = _as_sequences(queries), _as_sequences(keys)
        grads = backward(query.arrays, key.arrays, _seen(query, key), scale, causal=True)
        dq, dk, dv = (x.reshape(2, -1, *x.shape[1:]) for x in wide(grads))
        return dq, (dk, dv)

    def update(query: Blocks, key: Blocks, acc: Any) -> Any:
        """The gradients with the parts of one more pair of blocks."""
        dq, dk, dv = wide(backward(query.arrays, key.arrays, _seen(query, key), scale))
        return acc[0] + dq, (acc[1][0] + dk, acc[1][1] + dv)

    queries = (q_nbhSC, out_nbhSC, lse_nbhS, do_nbhSC)
    dq_nbhSC, sums = ring.ring_pass(update, None, queries, keys, diagonal=diagonal)
    dk_btkC, dv_btkC = (_from_query_blocks(x).astype(k_btkC.dtype) for x in sums)
    return _from_query_blocks(dq_nbhSC).astype(q_bthC.dtype), dk_btkC, dv_btkC, None


_ring.defvjp(_ring_fwd, _ring_bwd)


# --- cuDNN's kernels -----------------------------------------------------------------------------


def forward(
    q_bhSC: jax.Array,
    key: tuple[jax.Array, ...],
    seen_b1SS: jax.Array | None,
    scale: float,
    *,
    causal: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attention to a block's keys and values: output, log-sum-exp of scores [b, h, S]."""
    k_bkSC, v_bkSC = key
    return cudnn.dot_product_attention(
        q_bhSC,
        k_bkSC,
        v_bkSC,
        mask=seen_b1SS,
        scale=scale,
        mask_type=_mask_type(causal),
        qkv_layout=_LAYOUT,
        return_residual=True,
    )


def backward(
    query: tuple[jax.Array, ...],
    key: tuple[jax.Array, ...],
    seen_b1SS: jax.Array | None,
    scale: float,
    *,
    causal: bool = False,
) -> list[jax.Array]:
    """The gradients of a block's queries, keys and values.

    query: q, the output over all keys, the log-sum-exp of the scores of all keys, and the output's
    gradient. key: k and v.

    JAX has no public function for them: its own derivative takes the output of the same block.
    """
    (q_bhSC, out_bhSC, lse_bhS, do_bhSC), (k_bkSC, v_bkSC) = query, key
    none = jnp.zeros(0, q_bhSC.dtype)
    bias = none if seen_b1SS is None else cudnn.combine_bias_and_mask(None, seen_b1SS, none.dtype)
    # JAX 0.10 has no scores modified by a function.
    new = "score_mod_args" in inspect.signature(cudnn.dot_product_attention).parameters
    return cudnn._dot_product_attention_bwd_p_wrapper.bind(
        *(q_bhSC, k_bkSC, v_bkSC, bias),
        *[none] * 6,  # lengths, offsets and tables of pages
        *(lse_bhS, out_bhSC, do_bhSC),
        scale=scale,
        seed=42,
        dropout_rate=0.0,
        variadic_args=(seen_b1SS is not None, False),
        mask_type=_mask_type(causal),
        layout=cudnn.AttentionLayout[_LAYOUT].value,
        sliding_window_length=None,
        **({"score_mod": None} if new else {}),
    )


def _mask_type(causal: bool) -> Any:
    return cudnn.MaskType.CAUSAL if causal else cudnn.MaskType.NO_MASK


# --- blocks --------------------------------------------------------------------------------------


def _query_blocks(x_bthC: jax.Array) -> jax.Array:
    """A device's two chunks, [2, b, h, S, C]."""
    b, t, h, c = x_bthC.shape
    return x_bthC.reshape(b, 2, t // 2, h, c).transpose(1, 0, 3, 2, 4)


def _from_query_blocks(x_nbhSC: jax.Array) -> jax.Array:
    """The inverse of `_query_blocks`, of queries and of keys."""
    n, b, h, s, c = x_nbhSC.shape
    return x_nbhSC.transpose(1, 0, 3, 2, 4).reshape(b, n * s, h, c)


def _as_sequences(blocks: Blocks) -> Blocks:
    """All blocks as one, each as a sequence of its own, [n b, ...]."""
    arrays, segments = jax.tree.map(
        lambda x: x.reshape(-1, *x.shape[2:]), (blocks.arrays, blocks.places.segments_nbS)
    )
    return Blocks(arrays, blocks.places._replace(segments_nbS=segments))


def _seen(query: Blocks, key: Blocks) -> jax.Array | None:
    """Which keys are of the queries' documents, [b, 1, S, S]; None without document masks."""
    of_query, of_key = query.places.segments_nbS, key.places.segments_nbS
    return None if of_query is None else (of_query[:, :, None] == of_key[:, None, :])[:, None]
