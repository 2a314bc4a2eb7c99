"""The text that a tokenizer is trained on has the corpus's proportions."""

import gzip
import json
import random

import pytest

from gptjax.config import Config, DataConfig, TokenizerConfig
from gptjax.data import prepare, sources
from gptjax.data.files import Document
from gptjax.data.split import Split
from gptjax.data.tokenizer_sample import SLICE, sample

LATIN, GREEK = "abcdefghij", "αβγδεζηθικ"


def words(draw: random.Random, letters: str, size: int) -> str:
    """Text of so many bytes, which no compression makes much smaller."""
    return "".join(draw.choices(letters, k=size // len(letters[0].encode())))


def share_of_greek(texts: list[str]) -> float:
    sizes = [len(text.encode()) for text in texts]
    return sum(s for s, t in zip(sizes, texts, strict=True) if t[0] in GREEK) / sum(sizes)


@pytest.mark.parametrize(
    "greek",
    [pytest.param(0.1, marks=pytest.mark.slow), 0.3, pytest.param(0.5, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("greek_first", [False, True])
@pytest.mark.parametrize("packed", ["", "latin", "greek"])
def test_sample_has_the_proportions_of_the_corpus(tmp_path, greek, greek_first, packed) -> None:
    total, budget = 2_400_000, 800_000
    draw = random.Random(0)
    for name, letters, part in (("latin", LATIN, 1 - greek), ("greek", GREEK, greek)):
        file = tmp_path / f"{'01'[(name == 'greek') != greek_first]}-{name}.jsonl"
        records = [
            {"text": words(draw, letters, 20_000)} for _ in range(round(total * part / 20_000))
        ]
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        text = ("\n".join(lines) + "\n").encode()
        if name == packed:
            (tmp_path / f"{file.name}.gz").write_bytes(gzip.compress(text, 1))
        else:
            file.write_bytes(text)
    cfg = Config(
        data=DataConfig(sources=(str(tmp_path),)), tokenizer=TokenizerConfig(sample_bytes=budget)
    )
    found = sources.resolve(cfg.data.sources)
    split = Split.of(cfg, found, [])
    texts = list(prepare.tokenizer_sample(cfg, found, split, lambda *_: None))
    assert 0.98 * budget < sum(len(text.encode()) for text in texts) <= budget
    assert share_of_greek(texts) == pytest.approx(greek, abs=0.02)


def test_a_small_corpus_is_taken_whole_and_in_order() -> None:
    texts = ["a" * (SLICE + 5), "b", "c" * (2 * SLICE)]
    documents = [Document(text[0], text) for text in texts]
    assert "".join(sample(iter(documents), 10**6)) == "".join(texts)


def test_a_sample_comes_from_all_over_a_document() -> None:
    text = "".join(f"{n:07}\n" for n in range(100_000))
    taken = list(sample(iter([Document("long", text)]), len(text) // 10))
    places = [int(part[:7] if part[7] == "\n" else part.split("\n")[1]) for part in taken]
    assert places == sorted(places)
    assert places[0] < 10_000
    assert places[-1] > 90_000
