"""Log-likelihoods of continuations against plain numpy, for several batch sizes and meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_model import greedy, score

from gptjax.errors import DataError
from gptjax.evaluate import scoring
from gptjax.evaluate.scoring import encode_pair
from gptjax.tokenizer import ByteTokenizer

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def pairs(byte_params, byte_model) -> list[tuple[list[int], list[int]]]:
    """Pairs of many lengths; of two the continuation is greedy, of one all but its last token."""
    rng = np.random.default_rng(1)
    sizes = [(1, 1), (1, 20), (30, 3), (9, 9), (31, 1), (3, 30), (3, 2), (5, 12), (2, 15)]
    made = [tuple(rng.integers(0, 258, n).tolist() for n in size) for size in sizes]
    for prompt in ([7, 8, 9], [250] * 20):
        made.append((prompt, greedy(byte_params, byte_model, prompt, 5)))
    *likeliest, last = made[-1][1]
    made.append((made[-1][0], [*likeliest, (last + 1) % 258]))
    return made


@pytest.fixture(scope="module")
def expected(pairs, byte_params, byte_model) -> list[tuple[float, bool]]:
    return [score(byte_params, byte_model, *pair) for pair in pairs]


@pytest.mark.parametrize(
    ("mesh", "rows"),
    [
        ((1,), 1),
        ((8,), 5),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (((1,), 64), ((1, 8), 3), ((1, 1, 8), 2), ((2, 1, 1, 1, 4), 7))
        ),
    ],
    ids=str,
)
def test_scores_equal_those_of_numpy(
    mesh, rows, pairs, expected, byte_params, byte_model, put, scorer, on_mesh
) -> None:
    with on_mesh(*mesh):
        scores = scorer(rows).score(put(byte_params, byte_model), pairs)
    assert np.ptp([logprob for logprob, _ in expected]) > 30  # so that a mix-up would show
    assert [one.logprob for one in scores] == pytest.approx(
        [logprob for logprob, _ in expected], rel=1e-5, abs=1e-5
    )
    assert [one.greedy for one in scores] == [likeliest for _, likeliest in expected]
    assert [one.greedy for one in scores][-3:] == [True, True, False]
    assert [one.tokens for one in scores] == [len(continuation) for _, continuation in pairs]


@pytest.mark.slow
def test_padding_limits_the_number_of_compiled_programs(
    byte_params, byte_model, put, scorer, on_mesh
) -> None:
    pairs = [([1] * n, [2, 3]) for n in range(1, 64)]
    with on_mesh(1):
        scoring._score.clear_cache()
        params = put(byte_params, byte_model)
        scorer(4).score(params, pairs)
        assert scoring._score._cache_size() == 3  # of 16, 32 and 64 tokens
        scorer(4).score(params, pairs[::-3])
        assert scoring._score._cache_size() == 3


def test_greedy_takes_the_first_of_equally_likely_tokens(
    byte_params, byte_model, put, scorer, on_mesh
) -> None:
    with on_mesh(2, 2, 2):
        zeros = jax.tree.map(jnp.zeros_like, put(byte_params, byte_model))
        pairs = [([5], [0, 0]), ([5], [0, 1]), ([5], [257])]
        scores = scorer().score(zeros, pairs)
    assert [one.greedy for one in scores] == [True, False, False]
    assert [one.logprob / one.tokens for one in scores] == pytest.approx([-np.log(258)] * 3)


def test_long_context_is_truncated_at_its_beginning(
    byte_params, byte_model, put, scorer, on_mesh
) -> None:
    rng = np.random.default_rng(2)
    long, short = rng.integers(0, 258, 100).tolist(), [1, 2]
    with on_mesh(1):
        params = put(byte_params, byte_model)
        for max_length in (64, 20):
            limited = scorer(max_length=max_length)
            whole, _ = limited.score(params, [(long, [3, 4]), (short, [3])])
            kept = long[-(max_length - 1) :]
            wanted, _ = score(byte_params, byte_model, kept, [3, 4])
            assert whole.logprob == pytest.approx(wanted, rel=1e-5)
            exact = (kept, [3, 4])
            pairs = [(long, [3, 4]), (short, [3]), exact, ([0, *kept], [3, 4])]
            assert limited.count_truncated(pairs) == 2


@pytest.mark.parametrize("count", [0, 65])
def test_empty_or_too_long_continuation_is_an_error(count, byte_params, scorer) -> None:
    with pytest.raises(DataError, match=f"arc: continuation 1 has {count} tokens; .* 1 to 64"):
        scorer().score(byte_params, [([1], [2]), ([1], [2] * count)], "arc")


def test_context_and_continuation_are_encoded_as_one_prompt() -> None:
    tokenizer = ByteTokenizer()
    assert encode_pair(tokenizer, "ab", " c") == ([256, *b"ab"], [*b" c"])
    assert encode_pair(tokenizer, "ab \n", "c") == ([256, *b"ab"], [*b" \nc"])
    assert encode_pair(tokenizer, "", "c") == ([256], [*b"c"])
    assert encode_pair(tokenizer, " ", "c") == ([256], [*b" c"])


def test_token_merged_across_the_boundary_belongs_to_the_continuation() -> None:
    class Pairs(ByteTokenizer):
        """Two equal letters are one token."""

        bos_id = 300

        def encode(self, text):
            ids = []
            for byte in text.encode():
                ids[-1:] = [ids[-1] + 500] if ids[-1:] == [byte] else [*ids[-1:], byte]
            return ids

        def prompt(self, text):
            return self.encode(text)  # as a Hugging Face tokenizer without a template

    tokenizer = Pairs()
    assert encode_pair(tokenizer, "ab", "bc") == ([*b"ab"], [*b"c"])
    assert encode_pair(tokenizer, "", "bb") == ([300], [598])
