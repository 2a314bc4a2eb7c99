"""The split into training and validation, for few documents, for equal ones, and for one."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from gptjax.config import Config, DataConfig
from gptjax.data import sources
from gptjax.data.files import Counts
from gptjax.data.split import Split, share
from gptjax.errors import DataError

Sides = dict[str, list[str]]


def split(folder: Path, fraction: float, **data) -> tuple[Sides, Counts]:
    """The documents of each side, whole."""
    data = {"sources": (str(folder),), "valid_fraction": fraction, **data}
    cfg = Config(data=DataConfig(**data))
    held_out = sources.resolve(cfg.data.valid_sources, "data.valid_sources")
    found = sources.without(sources.resolve(cfg.data.sources), held_out)
    counts = Counts()
    documents = itertools.chain.from_iterable(s.documents(cfg.data, counts) for s in found)
    sides: Sides = {"train": [], "valid": []}
    part = ""
    for side, document in Split.of(cfg, found, held_out).apply(documents, counts):
        part += document.text
        if document.ends:
            sides[side].append(part)
            part = ""
    assert not part
    return sides, counts


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [2, 3, 5, 40])
@pytest.mark.parametrize("fraction", [1e-9, 0.02, 0.5, 0.98, 1 - 1e-9])
def test_both_sides_have_a_document_whenever_there_are_two(tmp_path, count, fraction, seed) -> None:
    texts = [f"document {n} of {seed}\n" for n in range(count)]
    for number, text in enumerate(texts):
        (tmp_path / f"{number:02}.txt").write_text(text)
    sides, _ = split(tmp_path, fraction)
    assert sorted(sides["train"] + sides["valid"]) == sorted(texts)
    assert sides["train"]
    assert sides["valid"]
    below = [text for text in texts if share(text) < fraction]
    if 0 < len(below) < count:
        assert sides["valid"] == below
    else:
        assert min(map(len, sides.values())) == 1


@pytest.mark.parametrize("limit", [9, 100, 1000, 64_000_000])
@pytest.mark.parametrize("fraction", [0.001, 0.02, 0.3])
def test_a_single_document_is_cut_near_its_end(tmp_path, fraction, limit) -> None:
    text = "".join(f"line {n}\n" for n in range(300))
    (tmp_path / "only.txt").write_text(text)
    sides, _ = split(tmp_path, fraction, max_document_bytes=limit)
    ((train,), (valid,)) = sides.values()
    assert train + valid == text
    assert train.endswith("\n") or limit < 20
    assert len(valid) == pytest.approx(len(text) * max(fraction, 0.01), abs=20)


def test_a_document_of_two_characters_is_cut_too(tmp_path) -> None:
    (tmp_path / "only.txt").write_text("ab")
    assert split(tmp_path, 0.02)[0] == {"train": ["a"], "valid": ["b"]}
    (tmp_path / "only.txt").write_text("a")
    with pytest.raises(DataError, match="all its documents are the same text"):
        split(tmp_path, 0.02)


def test_equal_documents_are_on_one_side(tmp_path) -> None:
    records = [{"text": f"record {n % 50}"} for n in range(400)]
    for name in ("a", "b"):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    sides, _ = split(tmp_path, 0.2)
    train, valid = (Counter(texts) for texts in sides.values())
    assert not set(train) & set(valid)
    assert set(train.values()) == set(valid.values()) == {16}
    assert 3 < len(valid) < 20


def test_training_documents_that_are_in_the_validation_text_are_left_out(tmp_path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(24):
        (tmp_path / "texts" / f"{number:02}.txt").write_text(f"document {number}\n" * 9)
    held_out = tmp_path / "valid.jsonl"
    texts = [f"document {number}\n" * 9 for number in range(18)]
    held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sides, counts = split(tmp_path / "texts", 0.02, valid_sources=(str(held_out),))
    assert sides == {"train": [f"document {n}\n" * 9 for n in range(18, 24)], "valid": []}
    assert counts.in_validation == 18


def test_the_hash_is_uniform_and_stable() -> None:
    shares = sorted(share(f"document {n}") for n in range(4000))
    assert all(abs(value - rank / 4000) < 0.03 for rank, value in enumerate(shares))
    assert share("\udce9") < 1  # a text need not be valid Unicode
    # Another value would move documents between the splits of existing corpora.
    assert share("a.txt") == pytest.approx(0.3033015, abs=1e-7)
