"""The logits processors in numpy and float64, one slot at a time, by their definitions."""

import numpy as np

from gptjax.sample import SamplingParams


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def distribution(logits, prompt, drawn, settings: SamplingParams):
    """Probabilities of the next token [V], by the processors in their documented order."""
    x = np.float64(logits).copy()
    allowed = np.ones(len(x), bool)
    for token, bias in settings.logit_bias:
        x[token] += bias
    allowed[list(settings.banned)] = False
    for token in {*prompt, *drawn}:
        x[token] *= settings.repetition_penalty ** (-1 if x[token] > 0 else 1)
    for token in set(drawn):
        x[token] -= settings.presence_penalty + settings.frequency_penalty * drawn.count(token)
    if settings.temperature == 0:
        x[~allowed] = -np.inf
        return np.eye(len(x))[x.argmax()]
    x /= settings.temperature
    if settings.top_k:
        allowed &= x >= np.sort(x[allowed])[::-1][min(settings.top_k, allowed.sum()) - 1]
    if settings.top_p < 1:
        order = np.argsort(-np.where(allowed, x, -np.inf), kind="stable")
        share = softmax(np.where(allowed, x, -np.inf))[order]
        last = np.searchsorted(np.cumsum(share), settings.top_p - 1e-12)
        allowed &= x >= x[order[min(last, allowed.sum() - 1)]]
    if settings.min_p:
        allowed &= x - x[allowed].max() >= np.log(settings.min_p)
    return softmax(np.where(allowed, x, -np.inf))
