"""Loss of documents: every token is scored once, as by a loop over single tokens."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_model import logprobs

from gptjax.config import DataConfig
from gptjax.errors import DataError
from gptjax.evaluate import TextLoss
from gptjax.evaluate.documents import Documents, sliding_windows
from gptjax.tokenizer import ByteTokenizer

pytestmark = pytest.mark.usefixtures("quick_compile")

TEXTS = ["a", "naïve café, ünïcode" * 6, "short one", "x" * 33, "line\n" * 30]


@pytest.mark.parametrize(("length", "stride"), [(1, 1), (4, 1), (4, 3), (4, 4), (16, 5), (99, 99)])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 17, 64])
def test_sliding_windows_score_each_token_once_with_enough_context(count, length, stride) -> None:
    ids = np.arange(count + 1)
    cut = list(sliding_windows(ids, length, stride))
    assert np.concatenate([part for _, part in cut]).tolist() == ids[1:].tolist()
    for number, (context, part) in enumerate(cut):
        window = np.concatenate([context, part])
        assert window.tolist() == list(range(window[0], part[-1] + 1))
        assert 1 <= len(window) - 1 <= length
        assert len(part) <= (stride if number else length)
        if number:  # as much context as there is room for
            assert len(window) - 1 == length
            assert len(context) >= length - stride + 1


def test_windows_without_overlap_are_those_of_lm_eval() -> None:
    cut = sliding_windows(np.array([-1, *range(10)]), 4, 4)
    read = [(context.tolist(), part.tolist()) for context, part in cut]
    assert read == [([-1], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]


@pytest.mark.parametrize(
    ("mesh", "length", "stride"),
    [
        pytest.param((1,), 64, 64, marks=pytest.mark.slow),
        ((1,), 16, 5),
        pytest.param((1,), 24, 1, marks=pytest.mark.slow),
        ((2, 2, 2), 16, 5),
        pytest.param((8,), 16, 16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_loss_equals_that_of_a_loop_over_tokens(
    mesh, length, stride, byte_params, byte_model, put, scorer, on_mesh
) -> None:
    tokenizer = ByteTokenizer()
    nats, tokens = [], 0
    for text in TEXTS:
        ids = [256, *text.encode()]
        tokens += len(ids) - 1
        end = 0
        for place in range(1, len(ids)):
            if place > end:  # a new window, whose last target is `end`
                end = min(len(ids) - 1, place - 1 + (stride if place > 1 else length))
                start = max(0, end - length)
                log_p = logprobs(byte_params, byte_model, ids[start:end])
            nats.append(-log_p[place - 1 - start, ids[place]])
    text_loss = TextLoss(Documents(TEXTS, False), tokenizer, scorer(), length, stride)
    with on_mesh(*mesh):
        params = put(byte_params, byte_model)
        measured = text_loss.run(params)
        (loss, _, bits) = text_loss.measure(params)
    size = sum(len(text.encode()) for text in TEXTS)
    assert measured["text_tokens"] == loss.denominators.sum() == tokens == len(nats)
    assert measured["text_loss"] == pytest.approx(math.fsum(nats) / tokens, rel=1e-5)
    assert measured["text_perplexity"] == pytest.approx(math.exp(measured["text_loss"]))
    assert measured["text_bytes"] == size == bits.denominators.sum()
    assert measured["text_bits_per_byte"] == pytest.approx(
        math.fsum(nats) / math.log(2) / size, rel=1e-5
    )


def test_bits_per_byte_divides_by_bytes_for_any_tokenizer(
    byte_params, byte_model, put, scorer, on_mesh
) -> None:
    class Letters(ByteTokenizer):
        """A token for each character."""

        def encode(self, text):
            return [ord(letter) % 256 for letter in text]

        def _encode_long(self, text):
            return np.array(self.encode(text), np.uint32)

        def decode(self, ids):
            return "".join(map(chr, ids))

    class Unknown(Letters):
        """The same token for each character."""

        def encode(self, text):
            return [0] * len(text)

        def decode(self, ids):
            return ""

    with on_mesh(1):
        zeros = jax.tree.map(jnp.zeros_like, put(byte_params, byte_model))
        run = lambda kind: TextLoss(Documents(["äöü"], False), kind, scorer(), 64, 64).run(zeros)
        bytewise, letterwise, lossy = map(run, (ByteTokenizer(), Letters(), Unknown()))
    assert (bytewise["text_tokens"], letterwise["text_tokens"]) == (6, 3)
    assert bytewise["text_bytes"] == letterwise["text_bytes"] == 6
    assert bytewise["text_bits_per_byte"] == pytest.approx(math.log2(258), rel=1e-5)
    assert letterwise["text_bits_per_byte"] == pytest.approx(math.log2(258) / 2, rel=1e-5)
    assert "text_lost_bits_per_byte" not in bytewise | letterwise
    lost = lossy["text_lost_bits_per_byte"]  # six bytes, the edit's end, its place and its length
    assert lost == pytest.approx((8 * 6 + 8 + 1 + 1) / 6)
    assert lossy["text_bits_per_byte"] == pytest.approx(math.log2(258) / 2 + lost, rel=1e-5)


# --- reading -----------------------------------------------------------------------------------


def test_documents_are_read_whole_up_to_a_limit(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    lines = [json.dumps({"body": text}) for text in ("x", " ", "y")]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    patterns = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")]
    cfg = DataConfig(text_field="body", max_document_bytes=15)
    whole = Documents.read(patterns, cfg)
    assert whole == Documents(["one\ntwo\nthree\n", "x", "y"], False)
    joined = Documents.read(patterns[:1], DataConfig(max_document_bytes=4))
    assert joined.texts == whole.texts[:1]
    assert Documents.read(patterns, cfg, 2) == Documents(whole.texts[:2], True)
    assert Documents.read(patterns, cfg, 3) == whole


def test_unreadable_text_is_reported_with_its_location(tmp_path) -> None:
    with pytest.raises(DataError, match=r"--text=.*absent.txt: no such file"):
        Documents.read([str(tmp_path / "absent.txt")], DataConfig())
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"text": 3}\n')
    with pytest.raises(DataError, match=r"b.jsonl:2: its field 'text' is 3 and no text"):
        Documents.read([str(tmp_path / "b.jsonl")], DataConfig())
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match=r"--text=.*empty.txt: no text in it"):
        Documents.read([str(tmp_path / "empty.txt")], DataConfig())
