"""New token stores in buckets: what a local preparation makes, whole or not at all."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from servers import FULL, Bucket, Faults

from gptjax import bucket as buckets
from gptjax.config import Config, DataConfig, MixturePart, ModelConfig, TokenizerConfig, TrainConfig
from gptjax.data import prepare, prepare_mixture, store
from gptjax.data.mixture import read_manifests
from gptjax.errors import ConfigError, OutputError


@pytest.fixture
def cfg(tmp_path: Path, place: str) -> Config:
    """Some text for a store in the bucket, with a tokenizer that is trained on it."""
    for number in range(20):
        text = Path(os.__file__).read_text()[3000 * number :][: 3000 + number]
        (tmp_path / f"{number}.txt").write_text(text)
    return Config(
        model=ModelConfig(vocab_size=320, context=32),
        tokenizer=TokenizerConfig(kind="huggingface", algorithm="byte_bpe", vocab_size=300),
        data=DataConfig(
            sources=(f"{tmp_path}/*.txt",),
            valid_fraction=0.2,
            store=f"{place}/store",
            cache=str(tmp_path / "cache"),
            workers=1,
        ),
        train=TrainConfig(tokens=4096, batch_tokens=512, seq_len=32),
    )


def with_data(cfg: Config, **fields: object) -> Config:
    return replace(cfg, data=replace(cfg.data, **fields))


def test_a_store_in_the_bucket_is_the_one_that_is_made_locally(cfg: Config, tmp_path: Path) -> None:
    said: list[str] = []
    there = prepare_mixture.prepare_parts(cfg, say=said.append)
    local = str(tmp_path / "local")
    here = prepare_mixture.prepare_parts(with_data(cfg, store=local))
    assert there.fingerprints() == here.fingerprints()
    assert list(store.verify(cfg.data.store)) == []
    folder = buckets.local_copy(cfg.data.store)
    names = lambda root: {f.relative_to(root).as_posix() for f in root.rglob("*") if f.is_file()}
    only_local = names(Path(local)) - names(folder)
    assert only_local == {"sources.json", "prepare.lock"}
    for name in names(folder):
        assert (folder / name).read_bytes() == (Path(local) / name).read_bytes(), name
    assert not [path for path in (tmp_path / "cache" / "new").iterdir() if path.is_dir()]
    assert any("is made in" in line for line in said)

    said.clear()  # it is there now, and nothing is made
    assert prepare_mixture.prepare_parts(cfg, say=said.append) == there
    assert said == []


@pytest.mark.slow
def test_a_mixture_in_the_bucket_gets_its_tokenizer_and_rows_there(
    cfg: Config, tmp_path: Path
) -> None:
    part = lambda pattern: MixturePart(sources=(f"{tmp_path}/{pattern}.txt",), weight=0.5)
    mixture = {"ones": part("1*"), "rest": part("[2-9]")}
    default = DataConfig()
    fields = {"packing": "documents", "documents": "mask", "sources": default.sources}
    mixed = with_data(cfg, mixture=mixture, valid_sources=(), **fields)
    there = prepare_mixture.prepare_parts(mixed)
    local = with_data(mixed, store=str(tmp_path / "local"))
    here = prepare_mixture.prepare_parts(local)
    assert there.fingerprints() == here.fingerprints()
    assert read_manifests(mixed).fingerprints() == here.fingerprints()
    root = buckets.path_of(mixed.data.store)
    index = json.loads((root / "ones" / "packed-32" / "packed.json").read_text())
    assert index == json.loads((tmp_path / "local/ones/packed-32/packed.json").read_text())
    assert (root / "mixture.json").exists()

    # A part that is added has the tokenizer of those that are there.
    stores = {name: replace(one, store=f"{root}/{name}") for name, one in mixture.items()}
    more = with_data(mixed, mixture=stores | {"zero": part("*")}, store=f"{root}-more")
    added = prepare_mixture.prepare_parts(more)
    assert added.tokenizer == here.tokenizer
    assert list(added.parts) == ["ones", "rest", "zero"]


@pytest.mark.slow
def test_a_copy_that_was_cut_off_goes_on_without_tokenizing_again(
    cfg: Config, bucket: Bucket, tmp_path: Path, monkeypatch
) -> None:
    def full_meanwhile(phase: str, done: int, _: int | None) -> None:
        if phase.startswith("copy") and done:
            bucket.proxy.faults = Faults(refused=FULL)

    with pytest.raises(OutputError, match=r"/store: cannot be written"):
        prepare_mixture.prepare_parts(cfg, tell=full_meanwhile)
    place = buckets.path_of(cfg.data.store)
    assert (place / "being-made.json").exists()
    assert not (place / "manifest.json").exists()
    bucket.proxy.faults = Faults()
    monkeypatch.setattr(prepare, "_tokenize", None)
    prepare_mixture.prepare_parts(cfg)
    assert list(store.verify(cfg.data.store)) == []
    assert not (place / "being-made.json").exists()


@pytest.mark.slow
def test_a_bucket_that_cannot_be_written_is_told_before_anything_is_made(
    cfg: Config, bucket: Bucket, tmp_path: Path
) -> None:
    bucket.proxy.faults = Faults(refused=FULL)
    said: list[str] = []
    with pytest.raises(OutputError, match=r"/store/being-made.json: cannot be written: PERM"):
        prepare_mixture.prepare_parts(cfg, say=said.append)
    assert said == []
    assert [path.suffix for path in (tmp_path / "cache" / "new").iterdir()].count(".lock") == 1


def test_files_of_another_store_are_not_overwritten(cfg: Config) -> None:
    there = buckets.path_of(cfg.data.store)
    (there / "train/c/0").write_bytes(b"tokens of another")
    with pytest.raises(OutputError, match=r"/store/train/c/0: exists with other contents; give"):
        prepare_mixture.prepare_parts(cfg)
    assert (there / "train/c/0").read_bytes() == b"tokens of another"
    assert not (there / "manifest.json").exists()


def test_a_file_that_another_machine_writes_meanwhile_is_not_overwritten(place: str) -> None:
    kept = buckets.open_kvstore(place)

    class Raced:
        """A bucket where another writes between a look and a write."""

        read = staticmethod(kept.read)

        def write(self, key: str, contents: bytes, **condition: bytes):
            kept.write(key, b"of another").result()
            return kept.write(key, contents, **condition)

    assert not buckets._is_put(Raced(), "file", b"mine")
    assert kept.read("file").result().value == b"of another"


def test_a_cache_is_needed(cfg: Config) -> None:
    with pytest.raises(ConfigError, match=r"/store: is made on this machine's disk; give data.ca"):
        prepare_mixture.prepare_parts(with_data(cfg, cache=""))


@pytest.mark.slow
def test_tokens_are_imported_into_the_bucket(
    place: str, tmp_path: Path, command_line, monkeypatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    tokens = np.random.default_rng(0).integers(0, 256, 5000).astype("<u2")
    tokens[::50] = 256
    tokens.tofile(tmp_path / "tokens.bin")
    words = ["data", "import", str(tmp_path / "tokens.bin"), "--store", f"{place}/imported"]
    words += ["--tokenizer", "bytes", "--dtype", "uint16"]
    code, _, err = command_line(*words)
    assert code == 0, err
    assert list(store.verify(f"{place}/imported")) == []
    code, _, err = command_line(*words)
    assert code == 73
    assert f"--store={place}/imported: exists already; give a new folder" in err
