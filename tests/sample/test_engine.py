"""Continuous batching, chunked and shared prefill, ring buffer caches, cancellation, scores."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from test_sampler import COMPUTE, GREEDY, full_logits, generate, prompts_of

from gptjax.config import ComputeConfig
from gptjax.errors import ConfigError
from gptjax.kernels import cpu
from gptjax.sample import EngineLimits, Request, Sampler, SamplingParams, decoding, engine

pytestmark = pytest.mark.usefixtures("quick_compile")

DRAWN = SamplingParams(temperature=1.0, max_tokens=9, seed=3)


@pytest.fixture
def prefills(monkeypatch):
    """Shapes of the chunks that are prefilled."""
    shapes, prefill = [], decoding.prefill
    monkeypatch.setattr(
        decoding,
        "prefill",
        lambda p, chunk, *rest: shapes.append(chunk[0].shape) or prefill(p, chunk, *rest),
    )
    return shapes


def requests_of(prompts, settings, stop_ids=()):
    each = settings if isinstance(settings, list) else [settings] * len(prompts)
    return [Request(p, s, stop_ids, i) for i, (p, s) in enumerate(zip(prompts, each, strict=True))]


def drain(engine, burst=64):
    """Ids of every (request, sample), and how each finished."""
    ids, finish = {}, {}
    for event in engine.run(burst):
        key = event.request.index, event.sample
        assert key not in finish, "an event after the end"
        ids.setdefault(key, []).extend(t.id for t in event.tokens)
        if event.finish:
            finish[key] = event.finish
    assert set(ids) == set(finish)
    return ids, finish


def engine_of(params, model, slots, limits=EngineLimits(), capacity=64):  # noqa: B008
    return Sampler(params, model, COMPUTE).engine(slots=slots, capacity=capacity, limits=limits)


# --- continuous batching -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "burst"),
    [(2, 3), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((1, 64), (2, 64), (4, 1)))],
)
def test_slots_are_refilled_and_results_are_independent_of_slots_and_bursts(
    one_device, model, params, slots, burst
):
    lengths = [3, 9, 1, 20, 5, 2, 14]
    settings = [replace(DRAWN, max_tokens=n) for n in (2, 9, 5, 1, 9, 12, 3)]
    whole = Sampler(params, model, COMPUTE).generate(prompts_of(*lengths), settings)
    few = engine_of(params, model, slots)
    few.submit(*requests_of(prompts_of(*lengths), settings))
    assert few.waiting == 7
    ids, finish = drain(few, burst)
    assert [ids[i, 0] for i in range(7)] == [one.ids for one in whole]
    assert set(finish.values()) == {"length"}
    assert few.busy == few.waiting == 0


def test_ended_slot_takes_the_next_request_while_others_continue(one_device, model, params):
    settings = [replace(DRAWN, max_tokens=n) for n in (30, 2, 4, 9)]
    two = engine_of(params, model, 2)
    two.submit(*requests_of(prompts_of(3, 3, 3, 3), settings))
    first = two.step()
    assert [(e.request.index, len(e.tokens), e.finish) for e in first] == [
        (0, 2, None),
        (1, 2, "length"),
    ]
    assert [(e.request.index, e.finish) for e in two.step()] == [(0, None), (2, "length")]


@pytest.mark.slow
def test_request_may_be_submitted_while_others_decode(one_device, model, params):
    prompts = prompts_of(3, 7)
    alone = generate(params, model, prompts, DRAWN)
    late = engine_of(params, model, 4)
    first, second = requests_of(prompts, DRAWN)
    late.submit(first)
    ids = [t.id for event in late.step(4) for t in event.tokens]
    late.submit(second)
    rest, _ = drain(late, 2)
    assert [ids + rest[0, 0], rest[1, 0]] == alone


@pytest.mark.slow
def test_each_request_has_its_own_settings(one_device, model, params):
    each = [
        GREEDY,
        replace(GREEDY, repetition_penalty=1.5),
        replace(GREEDY, banned=tuple(range(0, 128, 2))),
        replace(DRAWN, top_k=4, max_tokens=12),
        replace(DRAWN, logit_bias=((77, 50.0),), max_tokens=12),
    ]
    prompts = prompts_of(5, 5, 5, 5, 5)
    together = Sampler(params, model, COMPUTE).generate(prompts, each)
    for i, (prompt, settings) in enumerate(zip(prompts, each, strict=True)):
        request = Request(prompt, settings, (), i)
        one = engine_of(params, model, 1, EngineLimits.of(settings, ()))
        one.submit(request)
        assert drain(one)[0][i, 0] == together[i].ids
    assert together[4].ids == [77] * 12
    assert all(i % 2 for i in together[2].ids)
    assert len({tuple(one.ids) for one in together}) == 5
    assert (
        len(set(together[1].ids)) > len(set(together[0].ids)) or together[0].ids != together[1].ids
    )


def test_cancelled_request_frees_its_slot_and_leaves_the_queue(one_device, model, params):
    many = engine_of(params, model, 2)
    one, two, three = requests_of(prompts_of(3, 3, 3), replace(DRAWN, max_tokens=50))
    many.submit(one, two, three)
    many.step(2)
    one.cancel()
    assert {e.request.index for e in many.step(2)} == {1, 2}
    three.cancel()
    two.cancel(0)
    assert many.step(2) == []
    assert many.busy == many.waiting == 0


# --- prompts -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"positions": "rope", "pattern": ("window", "full"), "window": 5},
    ],
)
def test_long_prompt_is_prefilled_in_chunks(
    one_device, tiny_model, random_params, monkeypatch, prefills, kind
):
    monkeypatch.setattr(engine, "CHUNK", 16)
    model = tiny_model(context=128, **kind)
    params = random_params(model)
    prompts = prompts_of(61, 17, 90)
    outs = generate(params, model, prompts)
    assert prefills == [(4, 16)] * 6
    for prompt, out in zip(prompts, outs, strict=True):
        scores = full_logits(params, model, [prompt + out])[0]
        assert scores[len(prompt) - 1 : -1].argmax(-1).tolist() == out


@pytest.mark.slow
def test_sliding_window_layers_keep_a_ring_buffer_cache(
    one_device, tiny_model, random_params, monkeypatch
):
    """Decoding far past the ring buffer's size, from different positions, in refilled slots."""
    monkeypatch.setattr(engine, "CHUNK", 16)
    model = tiny_model(context=128, positions="rope", pattern=("window", "full"), window=6)
    params = random_params(model)
    sampler = Sampler(params, model, COMPUTE)
    some = sampler.engine(slots=2, capacity=128, limits=EngineLimits())
    sizes = [cache.keys_PBKSC.shape[3] for cache in some._caches]
    assert sizes == [6 + 16 - 1, 128]
    prompts = prompts_of(50, 3, 20, 1)
    some.submit(*requests_of(prompts, replace(GREEDY, max_tokens=60)))
    ids, _ = drain(some)
    for i, prompt in enumerate(prompts):
        scores = full_logits(params, model, [prompt + ids[i, 0]])[0]
        assert scores[len(prompt) - 1 : -1].argmax(-1).tolist() == ids[i, 0]


def test_samples_of_a_prompt_share_its_prefill(one_device, model, params, prefills):
    prompts = prompts_of(20, 12)
    outs = generate(params, model, prompts, replace(DRAWN, samples=3))
    assert prefills == [(2, 32)]
    assert len({tuple(out) for out in outs}) == 6
    assert generate(params, model, prompts, DRAWN) == [outs[0], outs[3]]


PENALISED = replace(DRAWN, repetition_penalty=1.3, frequency_penalty=0.4, logprobs=2)


@pytest.mark.parametrize("settings", [DRAWN, PENALISED])
@pytest.mark.parametrize(
    "burst", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(64, marks=pytest.mark.slow)]
)
def test_short_prompts_read_by_decode_steps_have_the_results_of_a_prefill(
    one_device, model, params, prefills, monkeypatch, settings, burst
):
    prompts = prompts_of(*range(1, decoding.INLINE_PROMPT + 3))
    requests = requests_of(prompts, replace(settings, samples=2))

    def run():
        four = engine_of(params, model, 4, EngineLimits(penalties=True))
        four.submit(*requests)
        done = {}
        for event in four.run(burst):
            done.setdefault((event.request.index, event.sample), []).extend(event.tokens)
        return done

    read = run()
    assert prefills == [(1, 16)]  # of the longest alone
    monkeypatch.setattr(engine, "_is_inline", lambda prompt: False)
    prefilled = run()
    assert len(prefills) > 2
    assert [[t.id for t in tokens] for tokens in read.values()] == [
        [t.id for t in prefilled[key]] for key in read
    ]
    for key, tokens in read.items():
        for one, other in zip(tokens, prefilled[key], strict=True):
            assert [i for i, _ in one.top] == [i for i, _ in other.top]
            if one.logprob is not None:
                assert abs(one.logprob - other.logprob) < 1e-5


@pytest.mark.skipif(cpu.why_not() is not None, reason="XLA writes the caches")
@pytest.mark.parametrize("slots", [1, 4])
def test_decode_step_writes_its_caches_in_place(one_device, model, params, monkeypatch, slots):
    """XLA copied them three times in a step of one slot, a sixth of its time."""
    programs, burst = [], decoding.burst

    def spy(*args):
        programs.append(burst.lower(*args).compile().as_text())
        return burst(*args)

    monkeypatch.setattr(decoding, "burst", spy)
    generate(params, model, prompts_of(*[3] * slots))
    cache = rf"= f32\[1,\d+,{model.kv},\d+,{cpu.WIDTH}\]\S* ([\w-]+)"
    assert set(re.findall(cache, programs[0])) == {"parameter", "get-tuple-element"}


def test_stop_token_in_a_prompt_read_by_decode_steps_ends_nothing(one_device, model, params):
    one = engine_of(params, model, 1, EngineLimits(stops=2))
    one.submit(*requests_of([[7, 9, 7, 4]], GREEDY, stop_ids=(7, 9)))
    (event,) = one.step()
    drawn = [token.id for token in event.tokens]
    assert drawn
    assert drawn == generate(params, model, [[7, 9, 7, 4]])[0][: len(drawn)]
    assert event.finish == ("stop" if drawn[-1] in (7, 9) else "length")


# --- log-probabilities -------------------------------------------------------------------------


@pytest.mark.slow
def test_logprobs_are_those_of_the_model_before_logits_processors(one_device, model, params):
    prompts = prompts_of(4, 11)
    settings = replace(DRAWN, temperature=0.7, top_k=30, presence_penalty=0.3, logprobs=3)
    done = Sampler(params, model, COMPUTE).generate(prompts, settings)
    for prompt, one in zip(prompts, done, strict=True):
        scores = full_logits(params, model, [prompt + one.ids])[0, len(prompt) - 1 : -1]
        want = np.asarray(jax.nn.log_softmax(scores, -1))
        for row, token in zip(want, one.tokens, strict=True):
            assert abs(token.logprob - row[token.id]) < 1e-5
            order = np.argsort(-row)[:3]
            assert [i for i, _ in token.top] == order.tolist()
            np.testing.assert_allclose([p for _, p in token.top], row[order], atol=1e-5)
    assert all(
        t.logprob is None for t in Sampler(params, model, COMPUTE).generate([[1]], DRAWN)[0].tokens
    )


def test_scores_equal_those_of_the_full_forward(one_device, model, params):
    texts = prompts_of(9, 1, 30, 2)
    scored = Sampler(params, model, COMPUTE).score(texts, alternatives=2)
    assert [[t.id for t in one] for one in scored] == texts
    for text, one in zip(texts, scored, strict=True):
        want = np.asarray(jax.nn.log_softmax(full_logits(params, model, [text])[0], -1))
        assert one[0].logprob is None
        for row, token in zip(want, one[1:], strict=False):
            assert abs(token.logprob - row[token.id]) < 1e-5
            assert [i for i, _ in token.top] == np.argsort(-row)[:2].tolist()


@pytest.mark.slow
def test_scores_are_independent_of_slices_and_groups(one_device, model, params, monkeypatch):
    from gptjax.sample import logprobs, sampler

    texts = prompts_of(40, 12, 33)
    whole = Sampler(params, model, COMPUTE).score(texts)
    monkeypatch.setattr(logprobs, "SLICE", 21)
    monkeypatch.setattr(sampler, "SCORED_TOKENS", 64)
    logprobs.score.clear_cache()
    parts = Sampler(params, model, COMPUTE).score(texts)
    logprobs.score.clear_cache()
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(
            [t.logprob for t in one[1:]], [t.logprob for t in other[1:]], atol=1e-5
        )


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        ([[1], []], "text 1: is empty"),
        ([[1, 128]], r"text 0: has ids outside 0\.\.127"),
        ([[1] * 65], "text 0: has 65 tokens, more than model.context=64"),
        (["abc"], "no tokenizer"),
    ],
)
def test_invalid_text_to_score_is_refused(one_device, model, params, texts, problem):
    with pytest.raises(ConfigError, match=problem):
        Sampler(params, model, COMPUTE).score(texts)


# --- meshes and number formats -----------------------------------------------------------------


@pytest.mark.parametrize("mesh", [pytest.param((8, 1, 1), marks=pytest.mark.exhaustive), (2, 2, 2)])
@pytest.mark.slow
def test_refilled_slots_ring_buffers_and_scores_are_the_same_on_eight_devices(
    on_mesh, tiny_model, random_params, mesh
):
    model = tiny_model(
        context=64, positions="rope", pattern=("window", "full"), window=5, head_dim=cpu.WIDTH
    )
    prompts = prompts_of(3, 20, 1, 9, 30, 2, 2, 11, 8, 6)
    settings = [
        replace(DRAWN, max_tokens=3 + i, repetition_penalty=1.2, top_p=0.9, logprobs=1)
        for i in range(10)
    ]

    def run(slots):
        sampler = Sampler(random_params(model, std=0.1), model, COMPUTE, slots=slots)
        done = sampler.generate(prompts, settings)
        return [one.ids for one in done], sampler.score(prompts)

    with on_mesh(1, 1, 1):
        want, want_scores = run(16)
    with on_mesh(*mesh):
        got, got_scores = run(8)
    assert got == want
    for one, other in zip(got_scores, want_scores, strict=True):
        np.testing.assert_allclose(
            [t.logprob for t in one[1:]], [t.logprob for t in other[1:]], atol=1e-5
        )


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.slow
def test_weights_and_kv_cache_may_be_bfloat16(one_device, model, params, slots):
    sampler = Sampler(params, model, ComputeConfig(dtype="bfloat16"))
    assert sampler._params["embed"].dtype == "bfloat16"
    some = sampler.engine(slots=slots, capacity=32, limits=EngineLimits())
    assert some._caches[0].keys_PBKSC.dtype == "bfloat16"
    prompts = prompts_of(*range(4, 4 + slots))
    settings = replace(GREEDY, logprobs=0)
    for prompt, one in zip(prompts, sampler.generate(prompts, settings), strict=True):
        scores = full_logits(params, model, [prompt + one.ids])[0, len(prompt) - 1 : -1]
        want = np.asarray(jax.nn.log_softmax(scores, -1))
        for row, token in zip(want, one.tokens, strict=True):
            assert abs(token.logprob - row[token.id]) < 0.1
            assert row[token.id] > row.max() - 0.1


# --- limits and groups --------------------------------------------------------------


def test_request_beyond_the_capacity_or_the_limits_is_refused(one_device, model, params):
    small = engine_of(params, model, 2, capacity=16)
    with pytest.raises(
        ConfigError,
        match=r"max_tokens=9: with a prompt of 8 tokens, more than .* capacity of 16",
    ):
        small.submit(*requests_of(prompts_of(8), DRAWN))
    for change, name in [
        ({"presence_penalty": 1.0}, "penalties"),
        ({"banned": (3,)}, "biases"),
    ]:
        with pytest.raises(ConfigError, match=f"exceeds the engine's limit for {name}"):
            small.submit(*requests_of(prompts_of(2), replace(DRAWN, **change)))
    assert small.waiting == 0
    exact = engine_of(params, model, 2, EngineLimits(stops=3, biases=5, penalties=False))
    five = replace(DRAWN, banned=(1, 2, 3, 4, 5))
    exact.submit(*requests_of(prompts_of(2), five, (7, 8, 9)))
    assert exact.waiting == 1


@pytest.mark.slow
def test_samples_that_wait_for_slots_share_the_prefill_too(one_device, model, params, prefills):
    prompts = prompts_of(20, 13)
    settings = replace(DRAWN, samples=5)
    whole = Sampler(params, model, COMPUTE).generate(prompts, settings)
    prefills.clear()
    two = engine_of(params, model, 2)
    two.submit(*requests_of(prompts, settings))
    ids, _ = drain(two)
    assert len(prefills) == 2
    assert [ids[one.prompt, one.sample] for one in whole] == [one.ids for one in whole]


@pytest.mark.slow
def test_scores_equal_logprobs_of_decoding_with_a_padded_vocabulary(one_device, model, params):
    sampler = Sampler(params, model, COMPUTE, vocab_size=40)
    prompt = [5, 9, 30]
    (one,) = sampler.generate([prompt], replace(DRAWN, logprobs=1))
    scored = sampler.score([prompt + one.ids], alternatives=1)[0][3:]
    np.testing.assert_allclose(
        [t.logprob for t in scored], [t.logprob for t in one.tokens], atol=1e-5
    )
    assert [t.top[0][0] for t in scored] == [t.top[0][0] for t in one.tokens]


def test_stream_takes_one_sample_and_yields_the_tokens_of_generate(one_device, model, params):
    sampler = Sampler(params, model, COMPUTE)
    with pytest.raises(ConfigError, match="samples=2: must be 1 to stream"):
        next(sampler.stream([1, 2], replace(DRAWN, samples=2)))
    streamed = [t.id for _, tokens in sampler.stream([1, 2], DRAWN, 2) for t in tokens]
    assert streamed == sampler.generate([[1, 2]], DRAWN)[0].ids


@pytest.mark.slow
def test_long_and_short_prompts_are_prefilled_separately(
    one_device, tiny_model, random_params, monkeypatch, prefills
):
    monkeypatch.setattr(engine, "PREFILL_TOKENS", 64)
    model = tiny_model(context=64)
    params = random_params(model)
    prompts = prompts_of(13, 50, 14, 12, 15)
    outs = generate(params, model, prompts)
    assert prefills == [(4, 16), (1, 64)]
    assert outs == [generate(params, model, [prompt])[0] for prompt in prompts]


def test_sampling_params_accept_lists_and_a_single_stop_text():
    assert SamplingParams(stop="END", banned=[3], logit_bias=[[1, 2.0]]) == SamplingParams(
        stop=("END",), banned=(3,), logit_bias=((1, 2.0),)
    )
