"""The pre-training objective: next-token prediction.

A batch on the devices is `windows_BW`, int32 [B, T+1], and `lengths_B`, int32 [B], the number of
targets that count in each window (see data/loader.py). Shapes: B batch, T sequence, W = T+1,
N = B*T.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.config import Config
from gptjax.config.phases import Phase
from gptjax.model import decoder
from gptjax.model.decoder import Params
from gptjax.model.moe import Routing
from gptjax.parallel import sequence, sharding
from gptjax.training import loss
from gptjax.training.step import LossFn, Sums

DeviceBatch = dict[str, jax.Array]


def segment_documents(tokens_BT: jax.Array, start_id: int) -> tuple[jax.Array, jax.Array]:
    """Segment ids and positions: each token's document within its sequence, and its position there.

    A document begins with its start token, BOS or the EOS before it, from which its first token is
    predicted.
    """
    t = tokens_BT.shape[1]
    index_BT = jnp.broadcast_to(
        jnp.arange(t), tokens_BT.shape, out_sharding=sharding.spec("batch", None)
    )
    begins_BT = tokens_BT == start_id
    segments_BT = jnp.cumsum(begins_BT, axis=1)
    starts_BT = lax.cummax(jnp.where(begins_BT, index_BT, 0), axis=1)
    return segments_BT, index_BT - starts_BT


def abstract_batch(cfg: Config, phase: Phase | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and layouts of a training batch on the ambient mesh: of a phase, by default a batch of
    train.batch_tokens."""
    b, t = (phase.batch, phase.seq_len) if phase else (cfg.train.batch, cfg.train.seq_len)
    mesh = jax.sharding.get_mesh()
    abstract = lambda *shape: jax.ShapeDtypeStruct(
        shape,
        jnp.int32,
        sharding=jax.NamedSharding(mesh, sharding.spec("batch", *[None] * (len(shape) - 1))),
    )
    return {"windows_BW": abstract(b, t + 1), "lengths_B": abstract(b)}


def attention_backends(cfg: Config, seq_len: int | None = None) -> tuple[str, ...]:
    """The attention backend of each layer of a period in training on the ambient mesh, in sequences
    of this length, by default train.seq_len.

    Raises ConfigError.
    """
    return decoder.attention_backends(
        cfg.model,
        cfg.compute,
        sharding.target(),
        seq_len or cfg.train.seq_len,
        segments=cfg.data.documents == "mask",
        training=True,
    )


def next_token_loss(
    params: Params,
    cfg: Config,
    batch: DeviceBatch,
    eos_id: int,
    keys_B2: jax.Array | None = None,
    *,
    start_id: int | None = None,
    training: bool = False,
) -> tuple[jax.Array, Sums]:
    """The loss to differentiate, summed over targets in nats, and the sums behind the metrics.

    A document begins with `start_id`, which is no target, or by default with the EOS of the one
    before. Returns (sum of all losses, sums as `step.Sums` describes them). With `keys_B2`, key
    data of each sequence, dropout is on; with `training`, experts have a limited capacity.
    """
    tokens_BT, targets_BT = batch["windows_BW"][:, :-1], batch["windows_BW"][:, 1:]
    counts_BT = jnp.arange(tokens_BT.shape[1])[None] < batch["lengths_B"][:, None]
    start_id = eos_id if start_id is None else start_id
    if start_id != eos_id:
        counts_BT &= targets_BT != start_id
    segments_BT = positions_BT = None
    if cfg.data.documents == "mask":
        segments_BT, positions_BT = segment_documents(tokens_BT, start_id)
    tokens = TokenBatch(tokens_BT, targets_BT, counts_BT, segments_BT, positions_BT)
    return token_loss(params, cfg, tokens, keys_B2, training=training)


class TokenBatch(NamedTuple):
    """Tokens with the target of each, whether the target counts, its segment and its position."""

    tokens_BT: jax.Array
    targets_BT: jax.Array
    counts_BT: jax.Array
    segments_BT: jax.Array | None
    positions_BT: jax.Array | None


def token_loss(
    params: Params, cfg: Config, batch: TokenBatch, keys_B2: jax.Array | None, *, training: bool
) -> tuple[jax.Array, Sums]:
    """The loss of predicting the targets of a batch, as `next_token_loss` returns it."""
    b, t = batch.tokens_BT.shape
    # Evaluation uses as few microbatches as the pipeline allows, which its batch surely has.
    compute = cfg.compute if training else replace(cfg.compute, microbatches=0)
    out = decoder.apply(
        params,
        cfg.model,
        compute,
        batch.tokens_BT,
        positions_BT=batch.positions_BT,
        segments_BT=batch.segments_BT,
        keys_B2=keys_B2,
        training=training,
    )
    weights_N = sequence.flatten(batch.counts_BT.astype(jnp.float32))
    ce, z = loss.cross_entropy(
        out.x_ND,
        decoder.head(params),
        sequence.flatten(batch.targets_BT),
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
        extra, routing_sums = routing_loss(cfg, out.routing, sums["targets"] / (b * t))
        total, sums = total + extra, sums | routing_sums
    return total, sums


def routing_loss(cfg: Config, per_layer: Routing, scale: jax.Array) -> tuple[jax.Array, Sums]:
    """The auxiliary losses of a mixture of experts, and its sums.

    The router's sums are over all tokens; `scale` makes them sums over the targets, so that shares
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


def training_loss(cfg: Config, eos_id: int, start_id: int | None = None) -> LossFn:
    """The loss of pre-training, as `step.train_step` calls it."""
    return lambda params, batch, keys_B2: next_token_loss(
        params, cfg, batch, eos_id, keys_B2, start_id=start_id, training=True
    )
