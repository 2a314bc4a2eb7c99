"""Decoding against the full forward pass, sampling against numpy, seeds, stops and compilations."""

import contextlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_processors import distribution
from scipy import stats

from gptjax.config import ComputeConfig
from gptjax.errors import ConfigError
from gptjax.evaluate import Scorer
from gptjax.hf import safetensors
from gptjax.model import decoder
from gptjax.parallel import arrays, sharding
from gptjax.runtime.progress import Progress
from gptjax.sample import BeamSearchParams, Sampler, SamplingParams, decoding

pytestmark = pytest.mark.usefixtures("quick_compile")

COMPUTE = ComputeConfig()
KINDS = {
    "learned": {},
    "rope": {"positions": "rope", "kv_heads": 2},
    "alibi": {"positions": "alibi"},
    "none": {"positions": "none"},
    "windowed": {"pattern": ("window", "full"), "window": 4, "positions": "rope"},
}
SOME_KINDS = [
    kind if kind == "windowed" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS
]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


def prompts_of(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 128, n).tolist() for n in lengths]


def generate(params, model, prompts, settings=GREEDY, stop_ids=(), **kwargs):
    sampler = Sampler(params, model, COMPUTE, stop_ids=stop_ids, **kwargs)
    return [one.ids for one in sampler.generate(prompts, settings)]


def full_logits(params, model, sequences):
    """Logits [B, T, V] after every token of equally long sequences, by training's forward pass."""
    tokens = arrays.global_batch(np.asarray(sequences, np.int32), len(sequences))

    def forward(params, tokens):
        return decoder.logits(params, model, decoder.apply(params, model, COMPUTE, tokens)[0])

    return np.asarray(jax.jit(forward)(params, tokens)).reshape(*tokens.shape, -1)


# --- decode equals the forward pass ------------------------------------------------------------


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_cached_logits_equal_the_full_forward_at_every_step(
    one_device, tiny_model, random_params, kind
):
    model = tiny_model(**KINDS[kind])
    params = random_params(model, std=0.1)
    sequences = np.asarray(prompts_of(20, 20, 20), np.int32)
    prefilled, at = 7, lambda t: np.full((3, 1), t, np.int32)
    cache = decoder.empty_caches(model, 3, 24, "float32", chunk=7)

    @jax.jit
    def step(cache, tokens, positions):
        x, cache = decoder.decode(params, model, COMPUTE, tokens, positions, cache)
        return decoder.logits(params, model, x), cache

    place = lambda a: arrays.global_batch(a, 3)
    positions = np.broadcast_to(np.arange(prefilled, dtype=np.int32), (3, prefilled))
    first, cache = step(cache, place(sequences[:, :prefilled]), place(positions))
    got = [np.asarray(first).reshape(3, prefilled, -1)]
    for t in range(prefilled, 20):
        logits, cache = step(cache, place(sequences[:, t : t + 1]), place(at(t)))
        got.append(np.asarray(logits)[:, None])
    want = full_logits(params, model, sequences)
    assert want.std() > 0.1
    np.testing.assert_allclose(np.concatenate(got, 1), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_greedy_tokens_are_the_argmax_of_the_full_forward(
    one_device, tiny_model, random_params, kind
):
    model = tiny_model(tied_embeddings=False, **KINDS[kind])
    params = random_params(model)
    prompts = prompts_of(3, 1, 16, 17)
    outs = generate(params, model, prompts)
    assert [len(out) for out in outs] == [12] * 4
    assert len({token for out in outs for token in out}) > 5  # not one token repeated
    whole = np.zeros((4, 29), np.int32)
    for row, prompt, out in zip(whole, prompts, outs, strict=True):
        row[: len(prompt) + 12] = prompt + out
    likeliest = full_logits(params, model, whole).argmax(-1)
    for row, prompt, out in zip(likeliest, prompts, outs, strict=True):
        assert row[len(prompt) - 1 : len(prompt) + 11].tolist() == out


@pytest.mark.slow
def test_batched_prompts_continue_as_each_alone(one_device, model, params):
    prompts = prompts_of(3, 16, 17)
    together = generate(params, model, prompts)
    assert together == [generate(params, model, [prompt])[0] for prompt in prompts]


@pytest.mark.slow
def test_eight_devices_generate_the_tokens_of_one(
    on_mesh, model, params, random_params, tiny_model
):
    prompts = prompts_of(3, 9, 20)
    drawn = SamplingParams(temperature=1.0, top_k=20, top_p=0.9, max_tokens=12, seed=3)
    with on_mesh(1, 1, 1):
        one = [generate(params, model, prompts, settings) for settings in (GREEDY, drawn)]
    with on_mesh(2, 2, 2):
        split = random_params(model)
        assert len({str(s.index) for s in split["embed"].addressable_shards}) == 4
        eight = [generate(split, model, prompts, settings) for settings in (GREEDY, drawn)]
    assert eight == one
    assert one[0] != one[1]


# --- stopping ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("consume", [False, True])
def test_a_gpus_parameters_are_split_by_layer_and_given_ones_freed_if_so_told(
    one_device, tiny_model, random_params, monkeypatch, dtype, consume
):
    model = tiny_model(layers=4, pattern=("window", "full"), window=4)
    given = random_params(model)
    copies = jax.device_get(given)
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    params, unrolled = decoding.decoding_params(given, model, dtype, consume=consume)
    assert unrolled.pattern == ("window", "full") * 2
    freed = lambda tree: [leaf.is_deleted() for leaf in jax.tree.leaves(tree)]
    assert not any(freed(params))
    whole = dtype == "float32"  # else it was cast, and its copy freed
    matrices = [given["blocks"]["layer_1"]["mlp"][name] for name in ("up", "down")]
    assert freed(matrices) == [consume and whole] * 2
    assert not any(freed({k: v for k, v in given.items() if k != "blocks"}))
    for i in range(4):  # layer i is the (i // 2)-th of its place in the pattern
        for name in ("up", "down"):
            want = copies["blocks"][f"layer_{i % 2}"]["mlp"][name][i // 2][None]
            found = params["blocks"][f"layer_{i}"]["mlp"][name]
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, want.astype(found.dtype))


def test_stop_token_ends_its_slot_only(one_device, model, params):
    prompts = prompts_of(3, 5)
    first, second = generate(params, model, prompts)
    stop = next(token for token in first[2:-1] if token not in second)
    unseen = next(token for token in range(model.vocab_size) if token not in first + second)
    for stop_ids in [(stop,), (unseen, stop), (stop, unseen)]:
        stopped, other = generate(params, model, prompts, stop_ids=stop_ids)
        assert stopped == first[: first.index(stop) + 1]
        assert other == second


@pytest.mark.slow
@pytest.mark.parametrize("max_tokens", [1, 2, 31])
def test_slot_ends_after_max_tokens(one_device, model, params, max_tokens):
    prompts = prompts_of(3, 5, 17)
    outs = generate(params, model, prompts, replace(GREEDY, max_tokens=max_tokens))
    assert [len(out) for out in outs] == [max_tokens] * 3
    if max_tokens < 12:
        assert outs == [out[:max_tokens] for out in generate(params, model, prompts)]


def test_prompt_and_continuation_may_fill_the_context_exactly(one_device, model, params):
    (prompt,) = prompts_of(model.context - 3)
    (out,) = generate(params, model, [prompt], replace(GREEDY, max_tokens=3))
    likeliest = full_logits(params, model, [prompt + out])[0].argmax(-1)
    assert out == likeliest[len(prompt) - 1 : -1].tolist()


# --- sampling -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(SamplingParams(temperature=1.0), marks=pytest.mark.slow),
        pytest.param(SamplingParams(temperature=0.5), marks=pytest.mark.slow),
        pytest.param(SamplingParams(temperature=2.0, top_k=5), marks=pytest.mark.slow),
        pytest.param(SamplingParams(temperature=1.0, top_p=0.7), marks=pytest.mark.slow),
        pytest.param(SamplingParams(temperature=1.5, min_p=0.3), marks=pytest.mark.slow),
        pytest.param(
            SamplingParams(temperature=1.0, repetition_penalty=2.0, banned=(6,)),
            marks=pytest.mark.slow,
        ),
        SamplingParams(temperature=1.0, logit_bias=((4, 1.0),), top_k=6, top_p=0.9),
    ],
    ids=lambda s: ",".join(
        f"{k}={v}" for k, v in vars(s).items() if v != getattr(SamplingParams(), k)
    ),
)
def test_sampled_tokens_follow_the_processed_distribution(
    one_device, tiny_model, random_params, settings
):
    model = tiny_model(vocab_size=8, layers=1)
    params = random_params(model, std=0.15)
    prompt, slots = [1, 2, 3], 4096
    settings = replace(settings, max_tokens=1, seed=1, samples=slots)
    drawn = np.array(generate(params, model, [prompt], settings, slots=slots))[:, 0]
    scores = full_logits(params, model, [prompt])[0, -1, :8]
    share = distribution(scores, prompt, [], settings)
    counts = np.bincount(drawn, minlength=8)
    assert counts[share == 0].sum() == 0
    assert share.max() < 0.8
    found = stats.chisquare(counts[share > 0], slots * share[share > 0])
    assert found.pvalue > 1e-3


@pytest.mark.slow
def test_penalties_count_drawn_tokens(one_device, tiny_model, random_params):
    """Pairs of tokens, the second drawn from the distribution after the first."""
    model = tiny_model(vocab_size=8, layers=1)
    params = random_params(model, std=0.1)
    settings = SamplingParams(
        max_tokens=2, samples=4096, seed=2, presence_penalty=0.7, frequency_penalty=0.5
    )
    prompt = [1, 2]
    pairs = np.array(generate(params, model, [prompt], settings, slots=4096))
    first = np.bincount(pairs[:, 0], minlength=8).argmax()
    second = pairs[pairs[:, 0] == first, 1]
    scores = full_logits(params, model, [[*prompt, int(first)]])[0, -1, :8]
    share = distribution(scores, prompt, [int(first)], settings)
    counts = np.bincount(second, minlength=8)
    assert stats.chisquare(counts, len(second) * share).pvalue > 1e-3
    without = distribution(scores, prompt, [], SamplingParams())
    assert stats.chisquare(counts, len(second) * without).pvalue < 1e-3


@pytest.mark.slow
def test_draws_at_successive_positions_are_independent(one_device, tiny_model, random_params):
    """With a model that gives every token the same probability, so that only the streams matter."""
    model = tiny_model(vocab_size=8, layers=1)
    params = jax.tree.map(jnp.zeros_like, random_params(model))
    settings = SamplingParams(temperature=1.0, max_tokens=2, seed=5)
    pairs = np.array(generate(params, model, [[1]] * 2048, settings, slots=2048))
    table = np.bincount(pairs[:, 0] * 8 + pairs[:, 1], minlength=64)
    assert stats.chisquare(table).pvalue > 1e-3
    neighbours = np.bincount(pairs[:-1, 0] * 8 + pairs[1:, 0], minlength=64)
    assert stats.chisquare(neighbours).pvalue > 1e-3


@pytest.mark.slow
def test_seed_determines_samples_and_slots_are_independent(one_device, model, params):
    settings = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=12, seed=7)
    prompts = prompts_of(3, 5, 9)
    three = generate(params, model, prompts, settings)
    assert generate(params, model, prompts, settings) == three
    assert generate(params, model, prompts[:1], settings) == three[:1]
    assert generate(params, model, prompts[:2], settings) == three[:2]
    assert generate(params, model, prompts, replace(settings, seed=8)) != three
    same = generate(params, model, prompts[:1] * 3, settings)
    assert len({tuple(out) for out in same}) == 3  # each slot has its own stream


def test_seed_above_32_bits_is_refused_or_used_whole(one_device, model, params):
    settings = SamplingParams(temperature=1.0, max_tokens=12, seed=1)
    prompts = prompts_of(3)
    low = generate(params, model, prompts, settings)
    with contextlib.suppress(ConfigError):
        assert generate(params, model, prompts, replace(settings, seed=1 + 2**40)) != low


def test_top_k_of_one_is_greedy(one_device, model, params):
    prompts = prompts_of(3, 5, 9)
    settings = SamplingParams(temperature=1.0, top_k=1, max_tokens=12)
    assert generate(params, model, prompts, settings) == generate(params, model, prompts)


# --- compilation -------------------------------------------------------------------------------


@pytest.fixture
def compilations():
    """A list that grows by one for each program that XLA compiles."""
    seen = []

    def listen(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.slow
def test_new_length_seed_or_setting_within_a_bucket_compiles_nothing(
    one_device, tiny_model, random_params, compilations
):
    model = tiny_model(vocab_size=120, layers=1)  # that no other test has compiled already
    params = random_params(model)
    prompts = lambda *lengths: [[5] * n for n in lengths]
    settings = SamplingParams(temperature=1.0, top_k=5, top_p=0.9, max_tokens=12)
    generate(params, model, prompts(3, 12, 10, 5), settings)
    known = len(compilations)
    assert known > 0
    changed = SamplingParams(temperature=0.7, top_k=9, top_p=0.8, max_tokens=10, seed=4)
    generate(params, model, prompts(4, 12, 2, 16), changed)
    assert len(compilations) == known
    generate(params, model, prompts(18, 12, 2), settings)
    assert len(compilations) > known


@pytest.mark.parametrize("lengths", [(3, 5), (3, 12)])
@pytest.mark.slow
def test_precompile_with_zero_parameters_compiles_every_program_of_the_run(
    one_device, tiny_model, random_params, compilations, lengths
):
    model = tiny_model(vocab_size=110 + lengths[1], layers=1)
    prompts = [[5] * n for n in lengths]
    settings = SamplingParams(temperature=1.0, max_tokens=12)
    params = random_params(model)
    Sampler(safetensors.zeros(model, "float32"), model, COMPUTE).precompile(prompts, settings)
    known = len(compilations)
    assert known > 0
    outs = generate(params, model, prompts, settings)
    assert len(compilations) == known
    assert all(len(out) == 12 for out in outs)


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "settings", "problem"),
    [
        ([[1] * 60], GREEDY, "max_tokens=12: .*60 tokens.*model.context=64; at most 4 fit"),
        ([[1], []], GREEDY, "prompt 1: is empty"),
        ([[1], [5, 128]], GREEDY, r"prompt 1: has ids outside 0\.\.127"),
        ([[-1]], GREEDY, "prompt 0: has ids outside"),
        ([[1]], SamplingParams(temperature=-0.1), "temperature=-0.1: must not be negative"),
        ([[1]], SamplingParams(temperature=float("nan")), "temperature=nan"),
        ([[1]], SamplingParams(top_k=-1), "top_k=-1: must not be negative"),
        ([[1]], SamplingParams(top_p=0.0), "top_p=0.0: must be above 0"),
        ([[1]], SamplingParams(top_p=1.1), "top_p=1.1: .*at most 1"),
        ([[1]], SamplingParams(max_tokens=0), "max_tokens=0: must be at least 1"),
        ([[1]], SamplingParams(seed=-1), "seed=-1: must be at least 0"),
        ([[1]], SamplingParams(seed=2**63), "seed=.*below 2"),
    ],
)
def test_invalid_request_is_refused_with_its_reason(
    one_device, model, params, prompts, settings, problem
):
    with pytest.raises(ConfigError, match=problem):
        generate(params, model, prompts, settings)


def test_no_prompts_give_no_completions(one_device, model, params):
    assert generate(params, model, []) == []


def test_prompt_as_long_as_the_context_is_refused(one_device, model, params):
    with pytest.raises(ConfigError) as refusal:
        generate(params, model, [[1] * 70])
    assert "at most -" not in str(refusal.value)


def test_all_problems_are_reported_at_once(one_device, model, params):
    with pytest.raises(ConfigError) as refusal:
        generate(params, model, [[], [200], [1] * 60])
    assert len(refusal.value.problems) == 3
    with pytest.raises(ConfigError) as refusal:
        SamplingParams(temperature=-1, top_p=2, max_tokens=0).check()
    assert len(refusal.value.problems) == 3


def test_embedding_rows_beyond_the_vocabulary_are_never_drawn(one_device, model, params):
    settings = SamplingParams(temperature=5.0, max_tokens=40)  # nearly uniform
    some = generate(params, model, prompts_of(5, 5), settings, vocab_size=9)
    assert {i for out in some for i in out} <= set(range(9))
    assert max(i for out in generate(params, model, prompts_of(5, 5), settings) for i in out) > 9


@pytest.mark.slow
def test_log_probabilities_are_over_all_rows_of_the_model(on_mesh, tiny_model, random_params):
    """A tokenizer may have fewer tokens than the model has rows: they are never drawn."""
    model = tiny_model(vocab_size=40, layers=1)
    with on_mesh(1):
        params = random_params(model, std=0.5)
        sampler = Sampler(params, model, COMPUTE, vocab_size=30)
        prompt = [3, 1, 4]
        settings = SamplingParams(temperature=0.0, max_tokens=4, logprobs=5)
        (drawn,) = sampler.generate([prompt], settings)
        (beam,) = sampler.beam([prompt], BeamSearchParams(2, 0.0, returned=1, max_tokens=4))
        x_ND = decoder.apply(params, model, COMPUTE, jnp.array([prompt + drawn.ids]))[0]
        logits_NV = np.asarray(decoder.logits(params, model, x_ND))[:, :40]
        (scored,) = sampler.score([prompt + drawn.ids], 5)
        pair = (prompt, drawn.ids)
        (evaluated,) = Scorer(model, COMPUTE, 1, Progress(shown=False)).score(params, [pair])
        (of_beam,) = Scorer(model, COMPUTE, 1, Progress(shown=False)).score(
            params, [(prompt, beam.ids)]
        )
    want_NV = jax.nn.log_softmax(logits_NV, -1)
    assert np.exp(want_NV[:, :30]).sum(-1).max() < 0.99  # the other rows count
    want = [float(want_NV[2 + n, token]) for n, token in enumerate(drawn.ids)]
    assert drawn.ids == [int(want_NV[2 + n, :30].argmax()) for n in range(4)]
    assert [token.logprob for token in drawn.tokens] == pytest.approx(want, abs=1e-5)
    assert [token.logprob for token in scored[3:]] == pytest.approx(want, abs=1e-5)
    assert evaluated.logprob == pytest.approx(sum(want), abs=1e-4)
    assert beam.score == pytest.approx(of_beam.logprob, abs=1e-4)
    for token in (*drawn.tokens, *scored[3:]):
        assert len(token.top) == 5
        assert max(top for top, _ in token.top) < 30
