"""The tiny model in plain numpy and float64, one text at a time: the reference of these tests."""

import math

import jax
import numpy as np

from gptjax.config import ModelConfig


def logprobs(params, model: ModelConfig, ids) -> np.ndarray:
    """Log-probabilities of the vocabulary after each of the ids, [T, V]."""
    params = jax.tree.map(np.float64, jax.device_get(params))
    t = len(ids)
    assert t <= model.context
    x_TD = params["embed"][np.array(ids)] + params["positions"][:t]
    for i in range(model.layers):
        layer = jax.tree.map(lambda a: a[i], params["blocks"]["layer_0"])  # noqa: B023
        h_TD, w = _norm(x_TD, layer["norm_attn"]), layer["attn"]
        q, k, v = (np.einsum("td,dhc->htc", h_TD, w[n]) + w[f"{n}_bias"][:, None] for n in "qkv")
        scores_HTS = np.einsum("htc,hsc->hts", q, k) / math.sqrt(model.head)
        scores_HTS[:, np.triu(np.ones((t, t), bool), 1)] = -np.inf
        mixed_HTC = np.exp(_log_softmax(scores_HTS)) @ v
        x_TD = x_TD + np.einsum("htc,hcd->td", mixed_HTC, w["o"]) + w["o_bias"]
        h_TD, w = _norm(x_TD, layer["norm_mlp"]), layer["mlp"]
        u = h_TD @ w["up"] + w["up_bias"]
        u = 0.5 * u * (1 + np.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        x_TD = x_TD + u @ w["down"] + w["down_bias"]
    head_VD = params.get("head", params["embed"])[: model.vocab_size]
    return _log_softmax(_norm(x_TD, params["norm_final"]) @ head_VD.T)


def _norm(x, w):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w["scale"] + w["bias"]


def _log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def score(params, model: ModelConfig, context, continuation) -> tuple[float, bool]:
    """The continuation's log-likelihood, and whether each token is the likeliest."""
    ids = [*context, *continuation]
    log_p = logprobs(params, model, ids[:-1])[len(context) - 1 :]
    own = [log_p[i, token] for i, token in enumerate(continuation)]
    return math.fsum(own), list(log_p.argmax(-1)) == list(continuation)


def greedy(params, model: ModelConfig, prompt, count: int) -> list[int]:
    """Tokens of greedy decoding."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logprobs(params, model, ids)[-1].argmax()))
    return ids[len(prompt) :]
