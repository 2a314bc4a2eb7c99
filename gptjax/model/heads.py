"""The task's layer: one matrix on the hidden state of each sequence's last token.

As generative pre-training has it (Radford et al. 2018, section 3.2), without a bias: to a score of
each label, or of several sequences to one score each. Its parameters lie beside the decoder's.

Shapes: B examples, C sequences of each, S = B*C, T tokens, N = S*T, D embed, O outputs, K = C*O
scores.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gptjax.config import Config
from gptjax.model import decoder
from gptjax.model.decoder import Params
from gptjax.model.init import normal
from gptjax.parallel import sequence, sharding

NAME = "head_task"
NEVER = -1e30  # the score of a choice that there is not


def init(cfg: Config, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters by their name, or none where the task has no layer."""
    outputs = cfg.finetune.outputs
    if not outputs:
        return {}
    draw = normal(cfg.model.init_std)
    shape = (cfg.model.embed, outputs)
    return {NAME: {"score": draw(jax.random.fold_in(key, 1), shape, (None, None))}}


def last(x_ND: jax.Array, lengths_S: jax.Array) -> jax.Array:
    """What the decoder gives at each sequence's last token, [S, D]; zeros where it has none."""
    s = len(lengths_S)
    held_ND = jax.sharding.reshard(x_ND, sharding.spec("tokens", "embed"))
    x_STD = sequence.gather_natural(sequence.unflatten(held_ND, s, (x_ND.shape[-1],), ("embed",)))
    last_ST = jnp.arange(x_STD.shape[1])[None] == lengths_S[:, None] - 1
    return jnp.where(last_ST[..., None], x_STD, 0).sum(1)


def scores(params: dict[str, Any], x_SD: jax.Array, examples: int) -> jax.Array:
    """Scores of each example's labels, or of its choices, [B, K] in float32."""
    w_DO = params[NAME]["score"]
    y_SO = jnp.einsum(
        "sd,do->so", x_SD.astype(jnp.float32), w_DO, out_sharding=sharding.spec("batch", None)
    )
    shape = (examples, y_SO.size // examples)
    return lax.reshape(y_SO, shape, out_sharding=sharding.spec("batch", None))


def losses(scores_BK: jax.Array, labels_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of each example in nats, and whether its label's score is the largest."""
    at_BK = jnp.arange(scores_BK.shape[1])[None] == labels_B[:, None]
    own_B = jnp.where(at_BK, scores_BK, 0).sum(1)
    top_B1 = lax.stop_gradient(scores_BK.max(1, keepdims=True))
    log_total_B = jnp.log(jnp.exp(scores_BK - top_B1).sum(1)) + top_B1[:, 0]
    return log_total_B - own_B, own_B >= top_B1[:, 0]


def init_params(cfg: Config, key: jax.Array) -> Params:
    """Fresh parameters of a run: the decoder's, and its task's layer where it has one."""
    return decoder.init(cfg.model, key) | init(cfg, key)
