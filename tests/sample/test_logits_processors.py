"""Each logits processor, and all of them in their order, against numpy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_processors import distribution, softmax

from gptjax.model.layers import NEVER
from gptjax.parallel import sharding
from gptjax.sample import SamplingParams, logits_processors

pytestmark = pytest.mark.usefixtures("quick_compile")

PLAIN = SamplingParams(temperature=1.0)


@pytest.fixture(scope="module")
def logits():
    """Logits without ties, with many ties, and all equal."""
    rng = np.random.default_rng(0)
    ties = rng.integers(-3, 3, (20, 17)).astype(np.float32)
    return np.concatenate([3 * rng.normal(size=(20, 17)), ties, np.zeros((1, 17))]).astype("f4")


def kept(truncated, logits):
    """The mask of kept logits, after a check that their values did not change."""
    keep = np.asarray(truncated) != np.float32(NEVER)
    np.testing.assert_array_equal(truncated, np.where(keep, logits, np.float32(NEVER)))
    return keep


@pytest.mark.parametrize("k", [0, 1, 2, 5, 16, 17, 99])
def test_top_k_keeps_the_k_largest_and_ties_with_the_kth(logits, k):
    keep = kept(logits_processors.keep_top_k(logits, jnp.full(len(logits), k)), logits)
    if 0 < k < 17:
        least = np.sort(logits, -1)[:, -k]
        np.testing.assert_array_equal(keep, logits >= least[:, None])
        assert (keep[:20].sum(-1) == k).all()
        assert keep[-1].all()
    else:
        assert keep.all()


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.333, 0.5, 0.9, 0.999, 1.0])
def test_top_p_keeps_the_smallest_set_whose_mass_reaches_p(logits, p):
    keep = kept(logits_processors.keep_top_p(logits, jnp.full(len(logits), p)), logits)
    for row, mask in zip(np.float64(logits), keep, strict=True):
        share = softmax(row)
        assert share[mask].sum() > p - 1e-6
        assert row[mask].min() > row[~mask].max(initial=-np.inf)
        last = row == row[mask].min()  # without it, and those tied with it, too little is left
        assert p == 1 or share[mask & ~last].sum() < p + 1e-6


def test_a_gpus_search_of_four_bits_at_a_time_finds_the_same_thresholds(logits, monkeypatch):
    def truncated():
        n = len(logits)
        yield from (logits_processors.keep_top_k(logits, jnp.full(n, k)) for k in (0, 1, 5, 17))
        yield from (logits_processors.keep_top_p(logits, jnp.full(n, p)) for p in (1e-6, 0.5, 1.0))

    bit_by_bit = list(truncated())
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    for want, found in zip(bit_by_bit, truncated(), strict=True):
        np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.1, 0.5, 0.99])
def test_min_p_keeps_tokens_at_least_p_times_as_likely_as_the_likeliest(logits, p):
    keep = kept(logits_processors.keep_min_p(logits, jnp.full(len(logits), p)), logits)
    share = np.apply_along_axis(softmax, 1, np.float64(logits))
    np.testing.assert_array_equal(keep, share >= p * share.max(-1, keepdims=True))


def test_each_slot_has_its_own_setting(logits):
    k = jnp.arange(len(logits)) % 5
    together = logits_processors.keep_top_k(logits, k)
    alone = [
        logits_processors.keep_top_k(row[None], one[None])[0]
        for row, one in zip(logits, k, strict=True)
    ]
    np.testing.assert_array_equal(together, np.stack(alone))


CASES = {
    "unchanged": PLAIN,
    "temperature": replace(PLAIN, temperature=0.5),
    "hot": replace(PLAIN, temperature=3.0),
    "greedy": replace(PLAIN, temperature=0.0),
    "top-k": replace(PLAIN, top_k=5),
    "top-p": replace(PLAIN, top_p=0.7),
    "min-p": replace(PLAIN, min_p=0.2),
    "repetition": replace(PLAIN, repetition_penalty=1.7),
    "repetition rewarded": replace(PLAIN, repetition_penalty=0.6),
    "presence": replace(PLAIN, presence_penalty=0.9),
    "frequency": replace(PLAIN, frequency_penalty=0.8),
    "bias": replace(PLAIN, logit_bias=((3, 2.5), (9, -4.0))),
    "ban": replace(PLAIN, banned=(0, 5, 11)),
    "ban, greedy": replace(PLAIN, temperature=0.0, banned=tuple(range(16))),
    "all truncations": replace(PLAIN, temperature=1.4, top_k=9, top_p=0.8, min_p=0.1),
    "all": SamplingParams(
        logit_bias=((2, 3.0), (7, -1.0)),
        banned=(4, 6),
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=-0.3,
        temperature=0.8,
        top_k=8,
        top_p=0.9,
        min_p=0.05,
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_processed_logits_have_the_distribution_of_the_numpy_definitions(case):
    s = CASES[case]
    rng = np.random.default_rng(1)
    logits = np.float32(2 * rng.normal(size=(30, 17)))
    prompts = [rng.integers(0, 17, 4).tolist() for _ in logits]
    drawn = [rng.integers(0, 17, 6).tolist() for _ in logits]
    row = lambda value, dtype=np.float32: np.full(len(logits), value, dtype)
    biases = [*s.logit_bias, *((i, NEVER) for i in s.banned)]
    table = np.zeros((2, *logits.shape), np.int32)
    for i, (before, after) in enumerate(zip(prompts, drawn, strict=True)):
        table[0, i, before + after] = 1
        np.add.at(table[1, i], after, 1)
    params = logits_processors.ProcessorParams(
        np.tile(np.array([i for i, _ in biases], np.int32), (len(logits), 1)),
        np.tile(np.array([b for _, b in biases], np.float32), (len(logits), 1)),
        *(row(v) for v in (s.repetition_penalty, s.presence_penalty, s.frequency_penalty)),
        row(s.temperature),
        row(s.top_k, np.int32),
        row(s.top_p),
        row(s.min_p),
    )
    seen, counts = (table[0] > 0, table[1]) if s.has_penalties else (None, None)
    processed = jax.jit(logits_processors.process_logits, static_argnames="truncation")(
        logits, params, seen, counts, truncation=s.truncates
    )
    if s.temperature == 0:
        got = np.eye(17)[np.asarray(processed).argmax(-1)]
    else:
        got = np.asarray(jax.nn.softmax(processed, -1))
    want = [distribution(*each, s) for each in zip(logits, prompts, drawn, strict=True)]
    np.testing.assert_allclose(got, want, atol=1e-5)
    if case != "unchanged":
        assert np.abs(got - np.apply_along_axis(softmax, 1, np.float64(logits))).max() > 0.05
