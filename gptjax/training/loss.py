"""Cross-entropy over the vocabulary, in chunks, with its gradient computed in the same pass.

The logits of a chunk of tokens are computed, turned into the loss and its gradient, and dropped: so
neither the logits nor their gradient ever exist for the whole batch. It is one shard_map over the
mesh with its collectives written out: the output layer is gathered over fsdp once, each chunk sums
over the vocabulary's shards, and the output layer's gradient is summed over the batch's shards
once.

Shapes: N tokens, D embed, V vocabulary; in lower case, one device's share. C tokens of a chunk.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from gptjax.kernels import cpu
from gptjax.model.layers import NEVER
from gptjax.parallel import matmul, sharding

_VOCAB = "tensor"


@dataclass(frozen=True)
class _Settings:
    """Settings of a cross-entropy, see `cross_entropy`, and the layout of its inputs."""

    z_loss: float
    chunks: int
    vocab_size: int | None
    """None where no entry of the output layer is padding."""
    soft_cap: float
    axis: str
    """Logical axis of the tokens."""
    copies: tuple[str, ...]
    """Mesh axes that hold the same output layer, see `matmul.weight_copies`."""
    kernel: bool
    """Whether softmax and gradient are the kernel's for CPUs, which takes whole vocabularies."""


class _Chunk(NamedTuple):
    """One device's tokens of a chunk, or of all chunks [chunks, ...]."""

    x_CD: jax.Array
    targets_C: jax.Array
    weights_C: jax.Array


class _Softmax(NamedTuple):
    """Results of a chunk's forward pass that its gradient is computed from.

    exp_Cv are shifted by the largest logit, and total_C1 their sum over the vocabulary; bounded_Cv
    the tanh of soft-capped logits; hit_Cv true at the target.
    """

    exp_Cv: jax.Array
    total_C1: jax.Array
    lse_C: jax.Array
    hit_Cv: jax.Array
    bounded_Cv: jax.Array | None


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

    Entries of `w_VD` from `vocab_size` on are padding. `soft_cap` bounds the logits. `chunks` is
    the number of chunks, or where that does not divide a device's tokens, the nearest number below
    that does. Returns (cross-entropy sum, z-loss sum) in nats; the gradient flows through their
    sum.
    """
    settings = _settings(x_ND, w_VD, z_loss, chunks, vocab_size, soft_cap)
    in_specs, _ = _specs(x_ND)
    return jax.shard_map(
        functools.partial(_local_loss, settings),
        in_specs=in_specs,
        out_specs=(P(), P()),
        check_vma=False,
    )(x_ND, w_VD, targets_N, weights_N)


def _cross_entropy_fwd(
    x_ND: jax.Array, w_VD: jax.Array, targets_N: jax.Array, weights_N: jax.Array, *options: Any
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    in_specs, gradient_specs = _specs(x_ND)
    ce, z, *gradients = jax.shard_map(
        functools.partial(_local_loss_and_gradients, _settings(x_ND, w_VD, *options)),
        in_specs=in_specs,
        out_specs=(P(), P(), *gradient_specs),
        check_vma=False,
    )(x_ND, w_VD, targets_N, weights_N)
    if sharding.axis_size("w_embed") > 1:
        # Scatters the output layer's gradient before the layers' backward pass begins; a TPU's
        # scheduler would keep it whole until that ends, to hide a thousandth of a step.
        gradients = lax.optimization_barrier(gradients)
    return (ce, z), tuple(gradients)


def _cross_entropy_bwd(
    z_loss: float,
    chunks: int,
    vocab_size: int | None,
    soft_cap: float,
    gradients: Any,
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, None, None]:
    # Only the sum of the two is ever differentiated, so both cotangents are the same number.
    dx_ND, dw_VD = gradients
    g = cotangents[0]
    return dx_ND * g.astype(dx_ND.dtype), dw_VD * g, None, None


cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def _settings(
    x_ND: jax.Array,
    w_VD: jax.Array,
    z_loss: float,
    chunks: int,
    vocab_size: int | None,
    soft_cap: float,
) -> _Settings:
    padded = vocab_size is not None and vocab_size != len(w_VD)
    return _Settings(
        z_loss,
        chunks,
        vocab_size if padded else None,
        soft_cap,
        matmul.layout_of(x_ND).axis,
        matmul.weight_copies(),
        kernel=(
            sharding.platform() == "cpu"
            and sharding.axis_size("vocab") == 1
            and not soft_cap
            and cpu.ready()
        ),
    )


def _specs(x_ND: jax.Array) -> tuple[tuple[P, ...], tuple[P, P]]:
    """Partitions of the four arrays, and of the gradients of the first two."""
    x, w = jax.typeof(x_ND).sharding.spec, sharding.spec("vocab", "w_embed")
    tokens = sharding.spec("tokens")
    return (x, w, tokens, tokens), (x, w)


# --- one device's share --------------------------------------------------------------------------


def _local_loss(
    settings: _Settings,
    x_nD: jax.Array,
    w_vd: jax.Array,
    targets_n: jax.Array,
    weights_n: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x_nD = matmul.gather_tokens(x_nD, settings.axis)
    w_vD = matmul.gather_weight(w_vd, x_nD.dtype, 1)

    columns = _columns(w_vD)

    def loss(carry: None, chunk: _Chunk) -> tuple[None, tuple[jax.Array, jax.Array]]:
        losses, _ = _forward(settings, columns(), chunk)
        return carry, losses

    _, (ce, z) = _over_chunks(settings, loss, None, _Chunk(x_nD, targets_n, weights_n))
    return lax.psum((ce.sum(), z.sum()), sharding.RULES["tokens"])


def _local_loss_and_gradients(
    settings: _Settings,
    x_nD: jax.Array,
    w_vd: jax.Array,
    targets_n: jax.Array,
    weights_n: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    x_nD = matmul.gather_tokens(x_nD, settings.axis)
    w_vD = matmul.gather_weight(w_vd, x_nD.dtype, 1)

    columns, turned = _columns(w_vD), sharding.platform() == "cpu"

    def loss_and_gradients(dw: jax.Array, chunk: _Chunk) -> tuple[jax.Array, Any]:
        if settings.kernel:
            losses, dlogits_Cv = _by_kernel(settings, columns(), chunk)
        else:
            losses, softmax = _forward(settings, columns(), chunk)
            dlogits_Cv = _logits_gradient(settings, chunk, softmax)
        # Of the two forms of this product, that which transposes the smaller array.
        a, b = (chunk.x_CD, dlogits_Cv) if turned else (dlogits_Cv, chunk.x_CD)
        dw_chunk = jnp.matmul(
            sharding.transposed(a, left=True), b, preferred_element_type=jnp.float32
        )
        return dw + dw_chunk, (*losses, matmul.product("cv,vd->cd", dlogits_Cv, w_vD))

    zero = jnp.zeros(w_vD.shape[::-1] if turned else w_vD.shape, jnp.float32)
    tokens = _Chunk(x_nD, targets_n, weights_n)
    dw, (ce, z, dx) = _over_chunks(settings, loss_and_gradients, zero, tokens)
    dw_vD = sharding.kept_form(dw).T if turned else dw
    ce, z = lax.psum((ce.sum(), z.sum()), sharding.RULES["tokens"])
    dx_nD = matmul.sum_tokens(dx.reshape(x_nD.shape), settings.axis)
    return ce, z, dx_nD, matmul.scatter_weight(dw_vD, 1, settings.copies)


def _columns(w_vD: jax.Array) -> Callable[[], jax.Array]:
    """Gives the transposed output layer, which is copied once for all chunks if at all."""
    copy = sharding.transposed(w_vD) if sharding.copies_transposed(w_vD.dtype) else None
    return lambda: w_vD.T if copy is None else copy


def _over_chunks(settings: _Settings, function: Any, carry: Any, tokens: _Chunk) -> Any:
    """`lax.scan` of a function over chunks of the tokens; a call where there is one chunk."""
    n = len(tokens.x_CD)
    chunks = next(c for c in range(min(settings.chunks, n), 0, -1) if n % c == 0)
    if chunks == 1:
        return function(carry, tokens)
    split = lambda a: a.reshape(chunks, n // chunks, *a.shape[1:])
    return lax.scan(function, carry, jax.tree.map(split, tokens))


def _forward(
    settings: _Settings, w_Dv: jax.Array, chunk: _Chunk
) -> tuple[tuple[jax.Array, jax.Array], _Softmax]:
    """Cross-entropy and z-loss of a chunk, and its softmax."""
    _, targets_C, weights_C = chunk
    logits_Cv, bounded_Cv = _logits(w_Dv, chunk), None
    if cap := settings.soft_cap:
        bounded_Cv = jnp.tanh(logits_Cv / cap)
        logits_Cv = cap * bounded_Cv
    ids_v = lax.axis_index(_VOCAB) * w_Dv.shape[1] + jnp.arange(w_Dv.shape[1])
    if settings.vocab_size is not None:
        logits_Cv = jnp.where(ids_v < settings.vocab_size, logits_Cv, NEVER)
    hit_Cv = targets_C[:, None] == ids_v
    top_C1 = lax.pmax(logits_Cv.max(-1, keepdims=True), _VOCAB)
    exp_Cv = jnp.exp(logits_Cv - top_C1)
    total_C1 = lax.psum(exp_Cv.sum(-1, keepdims=True), _VOCAB)
    target_C = lax.psum(jnp.where(hit_Cv, logits_Cv, 0).sum(-1), _VOCAB)
    lse_C = (jnp.log(total_C1) + top_C1)[:, 0]
    losses = _losses(settings, weights_C, lse_C, target_C)
    return losses, _Softmax(exp_Cv, total_C1, lse_C, hit_Cv, bounded_Cv)


def _by_kernel(
    settings: _Settings, w_DV: jax.Array, chunk: _Chunk
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Cross-entropy and z-loss of a chunk, and the gradient of its logits [C, V].

    The kernel reads the logits from memory once, where XLA does so in each of its passes.
    """
    x_CD, targets_C, weights_C = chunk
    valid = settings.vocab_size or w_DV.shape[1]
    dlogits_CV, lse_C, target_C = cpu.cross_entropy(
        *(_logits(w_DV, chunk), targets_C, weights_C),
        x_CD.dtype,
        valid=valid,
        z_loss=settings.z_loss,
    )
    return _losses(settings, weights_C, lse_C, target_C), dlogits_CV


def _logits(w_Dv: jax.Array, chunk: _Chunk) -> jax.Array:
    return jnp.matmul(chunk.x_CD, w_Dv, preferred_element_type=jnp.float32)


def _losses(
    settings: _Settings, weights_C: jax.Array, lse_C: jax.Array, target_C: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and z-loss, summed over a chunk's tokens."""
    ce = (weights_C * (lse_C - target_C)).sum()
    return ce, settings.z_loss * (weights_C * lse_C * lse_C).sum()


def _logits_gradient(settings: _Settings, chunk: _Chunk, softmax: _Softmax) -> jax.Array:
    """The gradient of a chunk's losses with respect to its logits, [C, v]."""
    x_CD, _, weights_C = chunk
    exp_Cv, total_C1, lse_C, hit_Cv, bounded_Cv = softmax
    # d ce = weight * (softmax - hit);  d z = weight * 2 z_loss lse * softmax
    scale_C1 = (weights_C * (1 + 2 * settings.z_loss * lse_C))[:, None] / total_C1
    dlogits_Cv = exp_Cv * scale_C1 - jnp.where(hit_Cv, weights_C[:, None], 0)
    if bounded_Cv is not None:
        dlogits_Cv *= 1 - bounded_Cv * bounded_Cv
    return dlogits_Cv.astype(x_CD.dtype)
