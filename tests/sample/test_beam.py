"""Beam search against a plain implementation, its settings, and groups of prompts."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from test_sampler import COMPUTE, GREEDY, prompts_of

from gptjax.errors import ConfigError
from gptjax.model import decoder
from gptjax.parallel import arrays
from gptjax.sample import BeamSearchParams, Sampler

pytestmark = pytest.mark.usefixtures("quick_compile")
STOP = (3, 5, 8, 13, 21)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(vocab_size=24, context=32, layers=1)


@pytest.fixture(scope="module")
def params(on_mesh, model, random_params):
    with on_mesh(1, 1, 1):
        return random_params(model, std=0.15)


def plain_search(next_logprobs, prompt, s: BeamSearchParams, stop_ids):
    """Lists of (score, ids), best first: the definition, one beam and one token at a time."""
    live, finished = [(0.0, [])], []
    for step in range(1, s.max_tokens + 1):
        table = next_logprobs([prompt + ids for _, ids in live])
        after = sorted(
            (
                (total + row[token], [*ids, token])
                for (total, ids), row in zip(live, table, strict=True)
                for token in range(len(row))
            ),
            key=lambda pair: -pair[0],
        )
        ends = lambda ids: ids[-1] in stop_ids or len(ids) == s.max_tokens
        for total, ids in after[: s.width]:
            if ends(ids):
                finished.append((total / len(ids) ** s.length_penalty, ids))
        finished = sorted(finished, key=lambda pair: -pair[0])[: s.width]
        live = [pair for pair in after if not ends(pair[1])][: s.width]
        if len(finished) == s.width:
            if s.early_stopping is True:
                break
            reach = s.max_tokens if s.early_stopping == "never" and s.length_penalty > 0 else step
            if not live or live[0][0] / reach**s.length_penalty <= finished[-1][0]:
                break
    return finished[: s.returned]


@pytest.mark.parametrize(
    "early_stopping", [False, pytest.param(True, marks=pytest.mark.slow), "never"]
)
@pytest.mark.parametrize(
    "length_penalty",
    [
        0.0,
        1.0,
        pytest.param(2.0, marks=pytest.mark.slow),
        pytest.param(-1.0, marks=pytest.mark.slow),
    ],
)
def test_beams_equal_those_of_a_plain_search(
    one_device, model, params, early_stopping, length_penalty
):
    settings = BeamSearchParams(4, length_penalty, early_stopping, returned=3, max_tokens=7)
    prompts = prompts_of(3, 1, 6)
    prompts = [[i % 24 for i in prompt] for prompt in prompts]
    done = Sampler(params, model, COMPUTE, stop_ids=STOP).beam(prompts, settings)

    @jax.jit
    def every_logprob(tokens):
        scores = decoder.logits(params, model, decoder.apply(params, model, COMPUTE, tokens).x_ND)
        return jax.nn.log_softmax(scores[:, :24], -1)

    def next_logprobs(sequences):
        padded = np.zeros((4, 16), np.int32)  # one program for all
        padded[: len(sequences), : len(sequences[0])] = sequences
        logprobs = np.asarray(every_logprob(arrays.global_batch(padded, 4)))
        return logprobs.reshape(4, 16, -1)[: len(sequences), len(sequences[0]) - 1]

    lengths = set()
    for i, prompt in enumerate(prompts):
        want = plain_search(next_logprobs, prompt, settings, STOP)
        got = [one for one in done if one.prompt == i]
        assert [one.ids for one in got] == [ids for _, ids in want]
        np.testing.assert_allclose([one.score for one in got], [s for s, _ in want], atol=1e-4)
        assert [one.finish for one in got] == [
            "stop" if ids[-1] in STOP else "length" for _, ids in want
        ]
        lengths |= {len(ids) for _, ids in want}
    assert len(lengths) > 1 or length_penalty > 0


@pytest.mark.slow
def test_one_beam_without_stop_tokens_is_greedy(one_device, model, params):
    prompts = [[i % 24 for i in prompt] for prompt in prompts_of(3, 8)]
    sampler = Sampler(params, model, COMPUTE)
    one = sampler.beam(prompts, BeamSearchParams(width=1, max_tokens=12))
    assert [b.ids for b in one] == [g.ids for g in sampler.generate(prompts, GREEDY)]


@pytest.mark.parametrize("mesh", [pytest.param((8, 1, 1), marks=pytest.mark.slow), (2, 2, 2)])
@pytest.mark.slow
def test_eight_devices_find_the_beams_of_one(on_mesh, model, params, random_params, mesh):
    prompts = [[i % 24 for i in prompt] for prompt in prompts_of(3, 8, 2)]
    settings = BeamSearchParams(width=3, returned=3, max_tokens=6)
    with on_mesh(1, 1, 1):
        one = Sampler(params, model, COMPUTE, stop_ids=STOP).beam(prompts, settings)
    with on_mesh(*mesh):
        split = random_params(model, std=0.15)
        eight = Sampler(split, model, COMPUTE, stop_ids=STOP).beam(prompts, settings)
    assert [b.ids for b in eight] == [b.ids for b in one]
    np.testing.assert_allclose([b.score for b in eight], [b.score for b in one], atol=1e-4)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"width": 0}, "width=0: must be at least 1"),
        ({"returned": 5}, "returned=5: must be from 1 to width=4"),
        ({"early_stopping": "maybe"}, "early_stopping=maybe"),
        ({"length_penalty": float("nan")}, "length_penalty=nan"),
        ({"length_penalty": 50.0, "max_tokens": 12}, "length_penalty=50.0: .*below 1e30"),
        ({"width": 25}, "width=25: is above the vocabulary of 24"),
        ({"max_tokens": 40}, "max_tokens=40: .*at most 31 fit"),
    ],
)
def test_invalid_setting_is_refused(one_device, model, params, change, problem):
    settings = replace(BeamSearchParams(), **change)
    with pytest.raises(ConfigError, match=problem):
        Sampler(params, model, COMPUTE).beam([[1]], settings)


@pytest.mark.slow
def test_prompts_beyond_the_slots_are_searched_in_groups(one_device, model, params):
    prompts = [[i % 24 for i in prompt] for prompt in prompts_of(3, 8, 2, 5, 1)]
    settings = BeamSearchParams(width=3, returned=2, max_tokens=6)
    whole = Sampler(params, model, COMPUTE, stop_ids=STOP).beam(prompts, settings)
    few = Sampler(params, model, COMPUTE, stop_ids=STOP, slots=7).beam(prompts, settings)
    assert [(b.prompt, b.sample, b.ids) for b in few] == [
        (b.prompt, b.sample, b.ids) for b in whole
    ]
