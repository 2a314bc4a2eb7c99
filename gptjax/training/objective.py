"""The pre-training objective: predict each token from those before it.

A batch on the device is `windows_BW`, int32 [B, T+1], and `lengths_B`, int32 [B], how many of a
row's targets count (see data/pipeline.py). Shapes: B batch, T sequence, W = T+1, N = B*T.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.config import Config
from gptjax.model import decoder
from gptjax.model.decoder import Params
from gptjax.model.moe import Routing
from gptjax.parallel import sequence, sharding
from gptjax.training import loss
from gptjax.training.step import LossFn, Sums

DeviceBatch = dict[str, jax.Array]


def documents(tokens_BT: jax.Array, eos_id: int) -> tuple[jax.Array, jax.Array]:
    """Number of each token's document within its row, and its position within the document.

    A document begins after an EOS; the EOS that opens a row belongs to what follows it, as the
    thing that its first token is predicted from.
    """
    t = tokens_BT.shape[1]
    index_BT = jnp.broadcast_to(
        jnp.arange(t), tokens_BT.shape, out_sharding=sharding.spec("batch", None)
    )
    begins_BT = tokens_BT == eos_id
    segments_BT = jnp.cumsum(begins_BT, axis=1)
    starts_BT = lax.cummax(jnp.where(begins_BT, index_BT, 0), axis=1)
    return segments_BT, index_BT - starts_BT


def abstract_batch(cfg: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and layouts of a training batch on the ambient mesh."""
    b, t = cfg.train.batch, cfg.train.seq_len
    mesh = jax.sharding.get_mesh()
    rows = lambda *shape: jax.ShapeDtypeStruct(
        shape,
        jnp.int32,
        sharding=jax.NamedSharding(mesh, sharding.spec("batch", *[None] * (len(shape) - 1))),
    )
    return {"windows_BW": rows(b, t + 1), "lengths_B": rows(b)}


def attention_backends(cfg: Config) -> tuple[str, ...]:
    """The attention backend of each layer of a period in training on the ambient mesh.

    Raises ConfigError.
    """
    return decoder.attention_backends(
        cfg.model,
        cfg.compute,
        sharding.platform(),
        cfg.train.seq_len,
        segments=cfg.data.documents == "mask",
        training=True,
    )


def next_token(
    params: Params,
    cfg: Config,
    batch: DeviceBatch,
    eos_id: int,
    keys_B2: jax.Array | None = None,
    *,
    training: bool = False,
) -> tuple[jax.Array, Sums]:
    """The loss to differentiate, summed over targets, and the sums that metrics are made of.

    Returns (all losses together, {"loss", "targets", ...}), in nats and counts: "loss" is the
    cross-entropy; each other sum, divided by the targets, is a mean. With `keys_B2`, key data
    for each sequence, dropout is on;
    with `training`, experts have their capacity.
    """
    tokens_BT, targets_BT = batch["windows_BW"][:, :-1], batch["windows_BW"][:, 1:]
    counts_BT = jnp.arange(tokens_BT.shape[1])[None] < batch["lengths_B"][:, None]
    segments_BT = positions_BT = None
    if cfg.data.documents == "mask":
        # Each document opens with the EOS before it, so every token is predicted within its own.
        segments_BT, positions_BT = documents(tokens_BT, eos_id)
    given = TokenBatch(tokens_BT, targets_BT, counts_BT, segments_BT, positions_BT)
    return predicted(params, cfg, given, keys_B2, training=training)


class TokenBatch(NamedTuple):
    """Tokens and what is to be predicted at each, whether it counts, and its segment and place."""

    tokens_BT: jax.Array
    targets_BT: jax.Array
    counts_BT: jax.Array
    segments_BT: jax.Array | None
    positions_BT: jax.Array | None


def predicted(
    params: Params, cfg: Config, given: TokenBatch, keys_B2: jax.Array | None, *, training: bool
) -> tuple[jax.Array, Sums]:
    """What `next_token` gives, of targets that are given."""
    b, t = given.tokens_BT.shape
    # Evaluation goes through a pipeline in the fewest parts, which its batch surely has.
    compute = cfg.compute if training else replace(cfg.compute, microbatches=0)
    out = decoder.apply(
        params,
        cfg.model,
        compute,
        given.tokens_BT,
        positions_BT=given.positions_BT,
        segments_BT=given.segments_BT,
        keys_B2=keys_B2,
        training=training,
    )
    weights_N = sequence.flatten(given.counts_BT.astype(jnp.float32))
    ce, z = loss.cross_entropy(
        out.x_ND,
        decoder.head(params),
        sequence.flatten(given.targets_BT),
        weights_N,
        cfg.train.z_loss,
        cfg.compute.loss_chunks,
        cfg.model.vocab_size,
        cfg.model.logit_soft_cap,
    )
    total, sums = ce + z, {"loss": ce, "targets": weights_N.sum()}
    if cfg.train.z_loss:
        sums["z_loss"] = z
    if out.routing is not None:
        extra, routing_sums = routing(cfg, out.routing, sums["targets"] / (b * t))
        total, sums = total + extra, sums | routing_sums
    return total, sums


def routing(cfg: Config, per_layer: Routing, scale: jax.Array) -> tuple[jax.Array, Sums]:
    """What a mixture adds to the loss, and its sums.

    The router's sums are over all tokens; `scale` makes them as if over the targets, so that shares
    stay shares.
    """
    scaled = jax.tree.map(lambda a_L: scale * a_L, per_layer)
    sums = {
        "moe_balance": scaled.balance.mean(),
        "moe_router_z": scaled.router_z.mean(),
        "moe_dropped": scaled.dropped.mean(),
        "moe_load": scaled.load_E,
    }
    moe = cfg.model.moe
    return moe.balance_loss * sums["moe_balance"] + moe.router_z_loss * sums["moe_router_z"], sums


def training_loss(cfg: Config, eos_id: int) -> LossFn:
    """The loss of pre-training, as `step.train_step` takes it."""
    return lambda params, batch, keys_B2: next_token(
        params, cfg, batch, eos_id, keys_B2, training=True
    )
