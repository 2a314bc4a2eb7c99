"""Decoding against the full forward, the filters against numpy, and what a seed promises."""

import contextlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gptjax import sample, sharding
from gptjax.config import ComputeConfig
from gptjax.errors import ConfigError
from gptjax.model import decoder
from gptjax.model.attention import NEVER
from gptjax.sample import Settings

pytestmark = pytest.mark.usefixtures("quick_compile")

COMPUTE = ComputeConfig()
KINDS = {
    "learned": {},
    "rope": {"positions": "rope", "kv_heads": 2},
    "alibi": {"positions": "alibi"},
    "none": {"positions": "none"},
    "windowed": {"pattern": ("window", "full"), "window": 4, "positions": "rope"},
}
GREEDY = Settings(temperature=0.0, max_tokens=12)


def prompts_of(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 128, n).tolist() for n in lengths]


def generate(params, model, prompts, settings=GREEDY, stop_ids=()):
    return sample.generate(params, model, COMPUTE, prompts, stop_ids, settings)


def full_logits(params, model, rows):
    """Scores after every token of equally long rows, by training's forward pass, [B, T, V]."""
    tokens = sharding.global_batch(np.asarray(rows, np.int32), len(rows))

    def forward(params, tokens):
        return decoder.logits(params, model, decoder.apply(params, model, COMPUTE, tokens)[0])

    return np.asarray(jax.jit(forward)(params, tokens)).reshape(*tokens.shape, -1)


@pytest.fixture
def one_device(on_mesh):
    with on_mesh(1, 1, 1):
        yield


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(context=64, tied_embeddings=False)


@pytest.fixture(scope="module")
def params(on_mesh, model, random_params):
    with on_mesh(1, 1, 1):
        return random_params(model)


# --- decode equals the forward pass ------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
def test_cached_logits_are_those_of_the_full_forward_at_every_step(
    one_device, tiny_model, random_params, kind
):
    model = tiny_model(**KINDS[kind])
    params = random_params(model, std=0.1)
    rows = np.asarray(prompts_of(20, 20, 20), np.int32)
    prefilled, at = 7, lambda t: np.full((3, 1), t, np.int32)
    cache = decoder.empty_cache(model, 3, 24, "float32")

    @jax.jit
    def step(cache, tokens, positions):
        x, cache, _ = decoder.apply(
            params, model, COMPUTE, tokens, positions_BT=positions, cache=cache
        )
        return decoder.logits(params, model, x), cache

    place = lambda a: sharding.global_batch(a, 3)
    positions = np.broadcast_to(np.arange(prefilled, dtype=np.int32), (3, prefilled))
    first, cache = step(cache, place(rows[:, :prefilled]), place(positions))
    got = [np.asarray(first).reshape(3, prefilled, -1)]
    for t in range(prefilled, 20):
        logits, cache = step(cache, place(rows[:, t : t + 1]), place(at(t)))
        got.append(np.asarray(logits)[:, None])
    want = full_logits(params, model, rows)
    assert want.std() > 0.1
    np.testing.assert_allclose(np.concatenate(got, 1), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", list(KINDS))
def test_greedy_tokens_are_the_likeliest_of_the_full_forward_for_prompts_of_any_length(
    one_device, tiny_model, random_params, kind
):
    model = tiny_model(tied_embeddings=False, **KINDS[kind])
    params = random_params(model)
    prompts = prompts_of(3, 1, 16, 17)
    outs = generate(params, model, prompts)
    assert [len(out) for out in outs] == [12] * 4
    assert len({token for out in outs for token in out}) > 5  # no dull repetition
    whole = np.zeros((4, 29), np.int32)
    for row, prompt, out in zip(whole, prompts, outs, strict=True):
        row[: len(prompt) + 12] = prompt + out
    likeliest = full_logits(params, model, whole).argmax(-1)
    for row, prompt, out in zip(likeliest, prompts, outs, strict=True):
        assert row[len(prompt) - 1 : len(prompt) + 11].tolist() == out


def test_a_batch_of_prompts_continues_each_as_alone(one_device, model, params):
    prompts = prompts_of(3, 16, 17)
    together = generate(params, model, prompts)
    assert together == [generate(params, model, [prompt])[0] for prompt in prompts]


def test_a_mesh_of_eight_generates_the_tokens_of_one_device(
    on_mesh, model, params, random_params, tiny_model
):
    prompts = prompts_of(3, 9, 20)
    drawn = Settings(temperature=1.0, top_k=20, top_p=0.9, max_tokens=12, seed=3)
    with on_mesh(1, 1, 1):
        one = [generate(params, model, prompts, settings) for settings in (GREEDY, drawn)]
    with on_mesh(2, 2, 2):
        split = random_params(model)
        assert len({str(s.index) for s in split["embed"].addressable_shards}) == 4
        eight = [generate(split, model, prompts, settings) for settings in (GREEDY, drawn)]
    assert eight == one
    assert one[0] != one[1]


# --- stopping ----------------------------------------------------------------------------------


def test_a_row_stops_with_a_stop_token_and_the_others_go_on(one_device, model, params):
    prompts = prompts_of(3, 5)
    first, second = generate(params, model, prompts)
    stop = next(token for token in first[2:-1] if token not in second)
    unseen = next(token for token in range(model.vocab_size) if token not in first + second)
    for stop_ids in [(stop,), (unseen, stop), (stop, unseen)]:
        stopped, other = generate(params, model, prompts, stop_ids=stop_ids)
        assert stopped == first[: first.index(stop) + 1]
        assert other == second


@pytest.mark.parametrize("max_tokens", [1, 2, 31])
def test_a_row_stops_after_max_tokens(one_device, model, params, max_tokens):
    prompts = prompts_of(3, 5, 17)
    outs = generate(params, model, prompts, replace(GREEDY, max_tokens=max_tokens))
    assert [len(out) for out in outs] == [max_tokens] * 3
    if max_tokens < 12:
        assert outs == [out[:max_tokens] for out in generate(params, model, prompts)]


def test_a_prompt_and_its_continuation_may_fill_the_context_exactly(one_device, model, params):
    (prompt,) = prompts_of(model.context - 3)
    (out,) = generate(params, model, [prompt], replace(GREEDY, max_tokens=3))
    likeliest = full_logits(params, model, [prompt + out])[0].argmax(-1)
    assert out == likeliest[len(prompt) - 1 : -1].tolist()


# --- filters -----------------------------------------------------------------------------------


def numpy_top_k(logits, k):
    if k == 0:
        return np.ones_like(logits, bool)
    kth = np.sort(logits, -1)[:, ::-1][:, min(k, logits.shape[1]) - 1]
    return logits >= kth[:, None]


def numpy_top_p(logits, p):
    keep = np.zeros_like(logits, bool)
    for row, kept in zip(np.float64(logits), keep, strict=True):
        share = np.exp(row - row.max())
        share /= share.sum()
        order = np.argsort(-row, kind="stable")
        needed = np.searchsorted(np.cumsum(share[order]), p - 1e-12) + 1
        least = row[order[min(needed, len(row)) - 1]]
        kept[:] = row >= least
    return keep


@pytest.fixture(scope="module")
def logits():
    """Rows without ties, with many, and with nothing else."""
    rng = np.random.default_rng(0)
    ties = rng.integers(-3, 3, (20, 17)).astype(np.float32)
    return np.concatenate([3 * rng.normal(size=(20, 17)), ties, np.zeros((1, 17))]).astype("f4")


@pytest.mark.parametrize("k", [0, 1, 2, 5, 16, 17, 99])
def test_top_k_keeps_the_k_largest_and_ties_with_the_last(logits, k):
    got = np.asarray(sample.keep_top_k(logits, jnp.int32(k)))
    keep = numpy_top_k(logits, k)
    np.testing.assert_array_equal(got, np.where(keep, logits, np.float32(NEVER)))
    if 0 < k < 17:
        assert (keep[:20].sum(-1) == k).all()
        assert keep[-1].all()


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.333, 0.5, 0.9, 0.999, 1.0])
def test_top_p_keeps_the_fewest_whose_mass_reaches_p(logits, p):
    got = np.asarray(sample.keep_top_p(logits, jnp.float32(p)))
    keep = np.ones_like(logits, bool) if p == 1 else numpy_top_p(logits, p)
    np.testing.assert_array_equal(got, np.where(keep, logits, np.float32(NEVER)))
    weight = np.exp(np.float64(logits))
    assert (np.where(keep, weight, 0).sum(-1) / weight.sum(-1) > p - 1e-6).all()


def test_top_p_after_top_k_sees_what_top_k_has_left():
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
    both = sample.keep_top_p(sample.keep_top_k(logits, jnp.int32(2)), jnp.float32(0.5))
    assert (np.asarray(both)[0] > NEVER).tolist() == [True, False, False, False]  # 4/7 of two


# --- drawing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 5, 1.0), (1.0, 0, 0.7)]
)
def test_drawn_tokens_follow_the_claimed_distribution(
    one_device, tiny_model, random_params, temperature, top_k, top_p
):
    model = tiny_model(vocab_size=8, layers=1)
    params = random_params(model, std=0.15)
    prompt, rows = [1, 2, 3], 4096
    settings = Settings(temperature, top_k, top_p, max_tokens=1, seed=1)
    drawn = np.array(generate(params, model, [prompt] * rows, settings))[:, 0]
    scores = full_logits(params, model, [prompt])[:, -1, :8].astype(np.float64) / temperature
    keep = numpy_top_k(scores, top_k)
    keep &= numpy_top_p(np.where(keep, scores, NEVER), top_p)
    share = np.where(keep, np.exp(scores), 0)[0]
    share /= share.sum()
    assert keep.sum() < 8 or (top_k, top_p) == (0, 1.0)
    counts = np.bincount(drawn, minlength=8)
    assert counts[share == 0].sum() == 0
    assert share.max() < 0.8
    found = stats.chisquare(counts[share > 0], rows * share[share > 0])
    assert found.pvalue > 1e-3


def test_draws_at_successive_positions_are_independent(one_device, tiny_model, random_params):
    """A model that gives every token the same chance, so that only the streams matter."""
    model = tiny_model(vocab_size=8, layers=1)
    params = jax.tree.map(jnp.zeros_like, random_params(model))
    settings = Settings(temperature=1.0, max_tokens=2, seed=5)
    pairs = np.array(generate(params, model, [[1]] * 2048, settings))
    table = np.bincount(pairs[:, 0] * 8 + pairs[:, 1], minlength=64)
    assert stats.chisquare(table).pvalue > 1e-3
    neighbours = np.bincount(pairs[:-1, 0] * 8 + pairs[1:, 0], minlength=64)
    assert stats.chisquare(neighbours).pvalue > 1e-3


def test_a_seed_decides_the_samples_and_a_row_does_not_depend_on_the_rows_beside_it(
    one_device, model, params
):
    settings = Settings(temperature=1.0, top_p=0.9, max_tokens=12, seed=7)
    prompts = prompts_of(3, 5, 9)
    three = generate(params, model, prompts, settings)
    assert generate(params, model, prompts, settings) == three
    assert generate(params, model, prompts[:1], settings) == three[:1]
    assert generate(params, model, prompts[:2], settings) == three[:2]
    assert generate(params, model, prompts, replace(settings, seed=8)) != three
    same = generate(params, model, prompts[:1] * 3, settings)
    assert len({tuple(out) for out in same}) == 3  # each row has its own stream


def test_a_seed_above_32_bits_is_refused_or_counts_whole(one_device, model, params):
    settings = Settings(temperature=1.0, max_tokens=12, seed=1)
    prompts = prompts_of(3)
    low = generate(params, model, prompts, settings)
    with contextlib.suppress(ConfigError):
        assert generate(params, model, prompts, replace(settings, seed=1 + 2**40)) != low


def test_top_k_of_one_is_greedy(one_device, model, params):
    prompts = prompts_of(3, 5, 9)
    settings = Settings(temperature=1.0, top_k=1, max_tokens=12)
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


def test_a_new_length_seed_or_setting_inside_a_bucket_compiles_nothing(
    one_device, tiny_model, random_params, compilations
):
    model = tiny_model(vocab_size=120, layers=1)  # that no other test has compiled already
    params = random_params(model)
    rows = lambda *lengths: [[5] * n for n in lengths]
    settings = Settings(temperature=1.0, top_k=5, top_p=0.9, max_tokens=12)
    generate(params, model, rows(3, 5, 9), settings)
    known = len(compilations)
    assert known > 0
    changed = Settings(temperature=0.7, top_k=9, top_p=0.8, max_tokens=10, seed=4)
    generate(params, model, rows(4, 12, 2, 16), changed)
    assert len(compilations) == known
    generate(params, model, rows(17, 12, 2), settings)
    assert len(compilations) > known


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "settings", "problem"),
    [
        ([[1] * 60], GREEDY, "max_tokens=12: .*60 tokens.*model.context=64; at most 4 fit"),
        ([[1], []], GREEDY, "prompt 1: is empty"),
        ([[1], [5, 128]], GREEDY, r"prompt 1: has ids outside 0\.\.127"),
        ([[-1]], GREEDY, "prompt 0: has ids outside"),
        ([[1]], Settings(temperature=-0.1), "temperature=-0.1: must not be negative"),
        ([[1]], Settings(temperature=float("nan")), "temperature=nan"),
        ([[1]], Settings(top_k=-1), "top_k=-1: must not be negative"),
        ([[1]], Settings(top_p=0.0), "top_p=0.0: must be above 0"),
        ([[1]], Settings(top_p=1.1), "top_p=1.1: .*at most 1"),
        ([[1]], Settings(max_tokens=0), "max_tokens=0: must be at least 1"),
        ([[1]], Settings(seed=-1), "seed=-1: must not be negative"),
        ([[1]], Settings(seed=2**63), "seed=.*below 2"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_with_its_reason(
    one_device, model, params, prompts, settings, problem
):
    with pytest.raises(ConfigError, match=problem):
        generate(params, model, prompts, settings)


def test_no_prompts_at_all_have_no_continuations(one_device, model, params):
    assert generate(params, model, []) == []


def test_a_prompt_that_leaves_no_room_is_told_so(one_device, model, params):
    with pytest.raises(ConfigError) as refusal:
        generate(params, model, [[1] * 70])
    assert "at most -" not in str(refusal.value)


def test_all_problems_are_told_at_once(one_device, model, params):
    with pytest.raises(ConfigError) as refusal:
        generate(params, model, [[], [200], [1] * 60])
    assert len(refusal.value.problems) == 3
    with pytest.raises(ConfigError) as refusal:
        Settings(temperature=-1, top_p=2, max_tokens=0).check()
    assert len(refusal.value.problems) == 3


# --- texts -------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of one id a character, and EOS 0."""

    stop_ids, vocab_size = (0, 7), 128

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))

    def prompt(self, text):
        return [0, *self.encode(text)]


def test_a_text_is_continued_as_the_beginning_of_a_document(one_device, model, params):
    texts = sample.continue_texts(params, model, COMPUTE, Letters(), ["ab", ""], GREEDY)
    outs = generate(params, model, [[0, 97, 98], [0]], stop_ids=(0, 7))
    assert texts == ["".join(chr(i) for i in out if i not in (0, 7)) for out in outs]


def test_rows_of_the_table_that_are_no_piece_are_never_drawn(one_device, model, params):
    settings = Settings(temperature=5.0, max_tokens=40)  # nearly uniform
    outs = sample.generate(params, model, COMPUTE, prompts_of(5, 5), (0,), settings, vocab_size=9)
    assert {i for out in outs for i in out} <= set(range(9))
    assert max(i for out in generate(params, model, prompts_of(5, 5), settings) for i in out) > 9
