"""Task heads: a linear layer on the hidden state of each sequence's last token.

As in generative pre-training (Radford et al. 2018, section 3.2), without a bias: classification has
one sequence for each example and a score for each label, multiple choice a sequence and one score
for each choice. The head's parameters are beside the decoder's.

Shapes: B examples, C sequences of each, S = B*C, T positions, N = S*T tokens, D embed, O outputs,
K = C*O scores.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.config import Config
from gptjax.model import decoder, layers
from gptjax.model.decoder import Params
from gptjax.model.init import normal
from gptjax.parallel import sequence, sharding

NAME = "head_task"
NEVER = layers.NEVER  # the score of a padded choice


def init(cfg: Config, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters of the head by name; empty where the task has no head."""
    outputs = cfg.finetune.outputs
    if not outputs:
        return {}
    draw = normal(cfg.model.init_std)
    shape = (cfg.model.embed, outputs)
    return {NAME: {"score": draw(jax.random.fold_in(key, 1), shape, (None, None))}}


def last(x_ND: jax.Array, lengths_S: jax.Array) -> jax.Array:
    """Hidden states of each sequence's last token, [S, D]; zeros for an empty sequence."""
    s = len(lengths_S)
    gathered_ND = jax.sharding.reshard(x_ND, sharding.spec("tokens", "embed"))
    x_STD = sequence.gather_natural(
        sequence.unflatten(gathered_ND, s, (x_ND.shape[-1],), ("embed",))
    )
    last_ST = jnp.arange(x_STD.shape[1])[None] == lengths_S[:, None] - 1
    return jnp.where(last_ST[..., None], x_STD, 0).sum(1)


def scores(params: dict[str, Any], x_SD: jax.Array, examples: int) -> jax.Array:
    """Scores of each example's labels or choices, [B, K] in float32."""
    w_DO = params[NAME]["score"]
    y_SO = jnp.einsum(
        "sd,do->so", x_SD.astype(jnp.float32), w_DO, out_sharding=sharding.spec("batch", None)
    )
    shape = (examples, y_SO.size // examples)
    return lax.reshape(y_SO, shape, out_sharding=sharding.spec("batch", None))


def losses(scores_BK: jax.Array, labels_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of each example in nats, and whether its label's score is the largest."""
    hit_BK = jnp.arange(scores_BK.shape[1])[None] == labels_B[:, None]
    label_B = jnp.where(hit_BK, scores_BK, 0).sum(1)
    top_B1 = lax.stop_gradient(scores_BK.max(1, keepdims=True))
    lse_B = jnp.log(jnp.exp(scores_BK - top_B1).sum(1)) + top_B1[:, 0]
    return lse_B - label_B, label_B >= top_B1[:, 0]


def init_params(cfg: Config, key: jax.Array) -> Params:
    """Fresh parameters of a run: the decoder's, and the task head's where it has one."""
    return decoder.init(cfg.model, key) | init(cfg, key)
