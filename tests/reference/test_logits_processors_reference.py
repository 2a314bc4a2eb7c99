"""The logits processors against those of `transformers`, alone and together, to 1e-5."""

import jax
import numpy as np
import pytest

from gptjax.model.layers import NEVER
from gptjax.sample import logits_processors

pytestmark = pytest.mark.slow

SLOTS, VOCABULARY = 20, 1000


def params(**values):
    row = lambda name, default, dtype=np.float32: np.full(SLOTS, values.get(name, default), dtype)
    biases = values.get("biases", ())
    return logits_processors.ProcessorParams(
        np.tile(np.array([i for i, _ in biases], np.int32), (SLOTS, 1)),
        np.tile(np.array([b for _, b in biases], np.float32), (SLOTS, 1)),
        row("repetition", 1),
        row("presence", 0),
        row("frequency", 0),
        row("temperature", 1),
        row("top_k", 0, np.int32),
        row("top_p", 1),
        row("min_p", 0),
    )


def cases():
    from transformers.generation import logits_process as theirs

    ban = [[i] for i in range(0, VOCABULARY, 3)]
    return {
        "temperature": ({"temperature": 0.6}, [theirs.TemperatureLogitsWarper(0.6)]),
        "top-k": ({"top_k": 40}, [theirs.TopKLogitsWarper(40)]),
        "top-p": ({"top_p": 0.9}, [theirs.TopPLogitsWarper(0.9)]),
        "min-p": ({"min_p": 0.1}, [theirs.MinPLogitsWarper(0.1)]),
        "repetition": ({"repetition": 1.3}, [theirs.RepetitionPenaltyLogitsProcessor(1.3)]),
        "bias": (
            {"biases": ((5, 3.0), (7, -2.0))},
            [theirs.SequenceBiasLogitsProcessor([[[5], 3.0], [[7], -2.0]])],
        ),
        "ban": (
            {"biases": tuple((i, NEVER) for (i,) in ban)},
            [theirs.NoBadWordsLogitsProcessor(ban, eos_token_id=None)],
        ),
        "all": (
            {
                "biases": ((5, 3.0), (7, -2.0)),
                "repetition": 1.3,
                "temperature": 0.8,
                "top_k": 100,
                "top_p": 0.8,
                "min_p": 0.02,
            },
            [
                theirs.SequenceBiasLogitsProcessor([[[5], 3.0], [[7], -2.0]]),
                theirs.RepetitionPenaltyLogitsProcessor(1.3),
                theirs.TemperatureLogitsWarper(0.8),
                theirs.TopKLogitsWarper(100),
                theirs.TopPLogitsWarper(0.8),
                theirs.MinPLogitsWarper(0.02),
            ],
        ),
    }


@pytest.mark.parametrize(
    "name", ["temperature", "top-k", "top-p", "min-p", "repetition", "bias", "ban", "all"]
)
def test_probabilities_equal_those_of_transformers(name):
    import torch

    settings, processors = cases()[name]
    rng = np.random.default_rng(0)
    logits = np.float32(3 * rng.normal(size=(SLOTS, VOCABULARY)))
    tokens = rng.integers(0, VOCABULARY, (SLOTS, 30))
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, tokens, True, 1)
    got = logits_processors.process_logits(
        logits, params(**settings), seen, np.zeros(logits.shape, np.int32), truncation=True
    )
    want = torch.tensor(logits)
    for processor in processors:
        want = processor(torch.tensor(tokens), want)
    want = torch.softmax(want, -1).numpy()
    difference = np.abs(np.asarray(jax.nn.softmax(got, -1)) - want).max()
    print(f"\n{name:12} {difference:.1e}")
    assert difference < 1e-5
    plain = np.asarray(jax.nn.softmax(logits, -1))
    assert np.abs(plain - want).max() > 1e-3
