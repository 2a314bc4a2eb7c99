"""A finished store is used for the text that it was made of, and for no other."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from gptjax.config import Config, DataConfig, ModelConfig, TokenizerConfig
from gptjax.config.registry import DATA_SOURCES
from gptjax.data import prepare, provenance
from gptjax.errors import MismatchError


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    """A configuration of four files, two of which have the same name, and their store."""
    for folder in ("texts", "more"):
        (tmp_path / folder).mkdir()
        for name in ("a", "b"):
            (tmp_path / folder / f"{name}.txt").write_text(f"{folder} {name}\n")
    (tmp_path / "valid.txt").write_text("valid\n")
    cfg = Config(
        model=ModelConfig(vocab_size=258),
        tokenizer=TokenizerConfig(kind="bytes"),
        data=DataConfig(
            sources=(f"{tmp_path}/texts", f"{tmp_path}/more/*.txt", f"{tmp_path}/valid.txt"),
            valid_sources=(f"{tmp_path}/valid.txt",),
            store=str(tmp_path / "store"),
            workers=1,
        ),
    )
    prepare.prepare(cfg)
    return cfg


def changes(cfg: Config) -> list[str]:
    """What a new run is told of the store."""
    try:
        prepare.prepare(cfg)
    except MismatchError as error:
        return error.differences
    return []


def test_the_same_text_is_accepted_whatever_its_time(cfg, tmp_path) -> None:
    assert changes(cfg) == []
    for file in tmp_path.glob("*/*.txt"):
        os.utime(file, (1, 1))
    assert changes(cfg) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda f: (f / "texts/a.txt").write_text("longer than before"), "a.txt: has 18 bytes, 8"),
        (lambda f: (f / "more/a.txt").write_text("more A\n"), "a.txt (2): has other contents than"),
        pytest.param(
            lambda f: (f / "texts/c.txt").write_text("new\n"),
            "c.txt: is new",
            marks=pytest.mark.slow,
        ),
        (lambda f: (f / "more/b.txt").unlink(), "b.txt (2): is gone"),
        pytest.param(
            lambda f: (f / "valid.txt").unlink(), "valid.txt: is gone", marks=pytest.mark.slow
        ),
        pytest.param(
            lambda f: (f / "valid.txt").write_text("VALID\n"),
            "valid.txt: has other contents than",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["size", "contents", "new", "gone", "valid gone", "valid contents"],
)
def test_other_text_is_refused_by_name(cfg, tmp_path, change, told) -> None:
    manifest = prepare.prepare(cfg)
    change(tmp_path)
    (told_now,) = changes(cfg)
    assert told_now.startswith(told)
    said: list[str] = []
    assert prepare.prepare(cfg, say=said.append, begun_with=manifest.fingerprint()) == manifest
    (line,) = said
    assert line.startswith("the text has changed, and the run goes on with the tokens it has: ")
    assert told in line
    with pytest.raises(MismatchError):
        prepare.prepare(cfg, begun_with="another")
    (tmp_path / "store" / provenance.SOURCES).unlink()
    assert prepare.prepare(cfg) == manifest


def test_a_store_whose_text_is_not_here_is_used(cfg, tmp_path) -> None:
    for file in (*tmp_path.glob("*/*.txt"), tmp_path / "valid.txt"):
        file.unlink()
    assert changes(cfg) == []


def test_many_changes_are_counted(cfg, tmp_path) -> None:
    for number in range(9):
        (tmp_path / "texts" / f"new{number}.txt").write_text("new\n")
    *shown, last = changes(cfg)
    assert shown == [f"new{number}.txt: is new" for number in range(5)]
    assert last == "and 4 more"


def test_files_that_are_not_hashed_are_compared_by_their_times(cfg, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(provenance, "_HASHED_BYTES", 10)
    cfg = replace(cfg, data=replace(cfg.data, store=str(tmp_path / "unhashed")))
    prepare.prepare(cfg)
    assert changes(cfg) == []
    os.utime(tmp_path / "texts" / "a.txt", (1, 1))
    assert changes(cfg) == ["a.txt: was written to since the store was made"]


def test_another_tokenizer_at_the_same_path_is_refused(cfg, tmp_path) -> None:
    from gptjax.tokenizer import train

    texts = ["some text to train a tokenizer on\n" * 20]
    train(texts, TokenizerConfig(vocab_size=280)).save(tmp_path)
    kind = TokenizerConfig(path=str(tmp_path), vocab_size=280)
    data = replace(cfg.data, store=str(tmp_path / "pieces"))
    cfg = replace(cfg, tokenizer=kind, data=data, model=ModelConfig(vocab_size=300))
    prepare.prepare(cfg)
    assert changes(cfg) == []
    train(texts, TokenizerConfig(vocab_size=275)).save(tmp_path)
    (told,) = changes(cfg)
    assert told == f"tokenizer.path={tmp_path}: is another tokenizer than the store's"
    (tmp_path / "tokenizer.model").write_bytes(b"damaged")
    (told,) = changes(cfg)
    assert told.startswith(f"tokenizer.path={tmp_path}: not a SentencePiece model")


def test_sources_that_are_no_local_files_are_not_asked_again(cfg, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(DATA_SOURCES, "_items", dict(DATA_SOURCES._items))
    here = [True]

    @DATA_SOURCES.register("elsewhere")
    def elsewhere(rest: str):
        assert here, "asked again"
        return []

    data = replace(cfg.data, store=str(tmp_path / "mixed"))
    cfg = replace(cfg, data=replace(data, sources=(*data.sources, "elsewhere:x")))
    prepare.prepare(cfg)
    here.clear()
    assert changes(cfg) == []
    (tmp_path / "texts" / "new.txt").write_text("new\n")
    assert changes(cfg) == ["new.txt: is new"]


def test_damaged_list_of_sources_is_reported_and_stops_no_run(cfg, tmp_path) -> None:
    file = tmp_path / "store" / provenance.SOURCES
    begun_with = prepare.prepare(cfg).fingerprint()
    for damaged in ("", "[]", json.dumps({"a.txt": {"length": 3}})):
        file.write_text(damaged)
        with pytest.raises(MismatchError, match=r"sources.json: is damaged"):
            prepare.prepare(cfg)
        said: list[str] = []
        prepare.prepare(cfg, say=said.append, begun_with=begun_with)
        assert "sources.json: is damaged" in said[0]
