"""Cross-entropy over the vocabulary, in chunks, with its gradient taken in the same pass.

The logits of a chunk are made, turned into the loss and its gradient, and dropped; so neither
logits nor their gradient of the whole batch ever exist. It runs as one island over the mesh with
its collectives written out: the output layer is gathered over fsdp once, each chunk sums over the
vocabulary's shards, and the output layer's gradient is summed over the batch's shards once.

Shapes: N tokens, D embed, V vocabulary; inside the island these are one device's share.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from gptjax.parallel import matmul, sharding

NEVER = -1e30  # a logit that is no token's: finite, so that zero times it stays a number


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def cross_entropy(
    x_ND: jax.Array,
    w_VD: jax.Array,
    targets_N: jax.Array,
    weights_N: jax.Array,
    z_loss: float = 0.0,
    chunks: int = 1,
    vocab_size: int | None = None,
    soft_cap: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Sums over tokens of weight * -log p(target), and of weight * z_loss * logsumexp**2.

    Rows of `w_VD` from `vocab_size` on are no tokens. `soft_cap` bounds the logits.
    Returns (cross-entropy sum, z-loss sum) in nats. The gradient flows through their sum.
    """
    settings = (z_loss, chunks, vocab_size, soft_cap)
    return _island(x_ND, w_VD, targets_N, weights_N, *settings, gradients=False)


def _fwd(x_ND, w_VD, targets_N, weights_N, *settings):
    ce, z, *gradients = _island(x_ND, w_VD, targets_N, weights_N, *settings, gradients=True)
    if sharding.axis_size("w_embed") > 1:
        # The output layer's gradient is scattered before the layers' backward pass begins; a TPU's
        # scheduler would keep it whole until that ends, to hide what takes a thousandth of a step.
        gradients = lax.optimization_barrier(gradients)
    return (ce, z), tuple(gradients)


def _bwd(z_loss, chunks, vocab_size, soft_cap, residuals, cotangents):
    # Only the sum of the two is ever differentiated, so both cotangents are the same number.
    dx_ND, dw_VD = residuals
    g = cotangents[0]
    return dx_ND * g.astype(dx_ND.dtype), dw_VD * g, None, None


cross_entropy.defvjp(_fwd, _bwd)


def _island(x_ND, w_VD, targets_N, weights_N, z_loss, chunks, vocab_size, soft_cap, *, gradients):
    x_spec, row_spec = jax.typeof(x_ND).sharding.spec, sharding.spec("tokens")
    w_spec = sharding.spec("vocab", "w_embed")
    out_specs = (P(), P(), x_spec, w_spec) if gradients else (P(), P())
    local = functools.partial(
        _local,
        z_loss=z_loss,
        chunks=chunks,
        vocab_size=None if vocab_size == len(w_VD) else vocab_size,
        soft_cap=soft_cap,
        gradients=gradients,
        rows=matmul.rows_of(x_ND),
        copies=matmul.copies(),
    )
    return jax.shard_map(
        local, in_specs=(x_spec, w_spec, row_spec, row_spec), out_specs=out_specs, check_vma=False
    )(x_ND, w_VD, targets_N, weights_N)


def _local(
    x_ND,
    w_VD,
    targets_N,
    weights_N,
    *,
    z_loss,
    chunks,
    vocab_size,
    soft_cap,
    gradients,
    rows,
    copies,
):
    columns = sharding.RULES["vocab"]
    x_ND = matmul.gather_rows(x_ND, rows)
    n, d = x_ND.shape
    w_VD = matmul.gather_weight(w_VD, x_ND.dtype, 1)
    vocab_ids_V = lax.axis_index(columns) * w_VD.shape[0] + jnp.arange(w_VD.shape[0])

    def chunk(dw_VD, args):
        x_nD, targets_n, weights_n = args
        wide = sharding.wide(x_nD.dtype)
        logits_nV = jnp.einsum("nd,vd->nv", x_nD, w_VD, preferred_element_type=wide)
        logits_nV = logits_nV.astype(jnp.float32)
        if soft_cap:
            bounded_nV = jnp.tanh(logits_nV / soft_cap)
            logits_nV = soft_cap * bounded_nV
        if vocab_size is not None:
            logits_nV = jnp.where(vocab_ids_V < vocab_size, logits_nV, NEVER)
        hit_nV = targets_n[:, None] == vocab_ids_V
        top_n1 = lax.pmax(logits_nV.max(-1, keepdims=True), columns)
        e_nV = jnp.exp(logits_nV - top_n1)
        total_n1 = lax.psum(e_nV.sum(-1, keepdims=True), columns)
        hit_n = lax.psum(jnp.where(hit_nV, logits_nV, 0).sum(-1), columns)
        lse_n = (jnp.log(total_n1) + top_n1)[:, 0]
        ce = (weights_n * (lse_n - hit_n)).sum()
        z = z_loss * (weights_n * lse_n * lse_n).sum()
        if not gradients:
            return dw_VD, (ce, z)
        # d ce = weight * (softmax - hit);  d z = weight * 2 z_loss lse * softmax
        scale_n1 = (weights_n * (1 + 2 * z_loss * lse_n))[:, None] / total_n1
        dlogits_nV = e_nV * scale_n1 - jnp.where(hit_nV, weights_n[:, None], 0)
        if soft_cap:
            dlogits_nV *= 1 - bounded_nV * bounded_nV
        dlogits_nV = dlogits_nV.astype(x_nD.dtype)
        dx_nD = jnp.einsum("nv,vd->nd", dlogits_nV, w_VD)
        dw_VD += jnp.einsum("nv,nd->vd", dlogits_nV, x_nD, preferred_element_type=wide).astype(
            jnp.float32
        )
        return dw_VD, (ce, z, dx_nD)

    chunks = next(c for c in range(min(chunks, n), 0, -1) if n % c == 0)
    split = lambda a: a.reshape(chunks, n // chunks, *a.shape[1:])
    zero_VD = jnp.zeros(w_VD.shape if gradients else (), jnp.float32)
    args = (x_ND, targets_N, weights_N)
    if chunks == 1:
        dw_VD, (ce, z, *dx) = chunk(zero_VD, args)
    else:
        dw_VD, (ce, z, *dx) = lax.scan(chunk, zero_VD, jax.tree.map(split, args))
    sums = lax.psum((ce.sum(), z.sum()), sharding.RULES["tokens"])
    if not gradients:
        return sums
    dx_ND = matmul.sum_rows(dx[0].reshape(n, d), rows)
    return *sums, dx_ND, matmul.scatter_weight(dw_VD, 1, copies)
