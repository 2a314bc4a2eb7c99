"""Mixtures of data: their stores, their tokenizer, what is read and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gptjax import config
from gptjax import tokenizer as tokenizers
from gptjax.config import (
    Config,
    DataConfig,
    EvalConfig,
    MixturePart,
    ModelConfig,
    StageConfig,
    TokenizerConfig,
    TrainConfig,
)
from gptjax.data import loader, mixture, prepare, prepare_mixture, store
from gptjax.errors import ConfigError, DataError, MismatchError

BATCH, SEQ = 10, 16


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    """Two parts, three to seven: texts of one letter each."""
    for letter in "ab":
        (tmp_path / letter).mkdir()
        for number in range(4):
            text = f"{letter}{letter} " * (200 + number)
            (tmp_path / letter / f"{number}.txt").write_text(text)
    return Config(
        run=str(tmp_path / "run"),
        model=ModelConfig(vocab_size=300, context=32, layers=1, embed=16, heads=2),
        tokenizer=TokenizerConfig(kind="bytes"),
        data=DataConfig(
            store=str(tmp_path / "store"),
            workers=1,
            mixture={
                "a": MixturePart(3.0, (str(tmp_path / "a"),)),
                "b": MixturePart(7.0, (str(tmp_path / "b"),)),
            },
        ),
        eval=EvalConfig(sample_tokens=8),
        train=TrainConfig(tokens=4096, batch_tokens=BATCH * SEQ, seq_len=SEQ),
    )


def changed(cfg: Config, name: str, **fields) -> Config:
    parts = dict(cfg.data.mixture) | {name: replace(cfg.data.mixture[name], **fields)}
    return replace(cfg, data=replace(cfg.data, mixture=parts))


def letters_of(windows_BW: np.ndarray) -> list[str]:
    return ["b" if (row == ord("b")).any() else "a" for row in windows_BW]


def test_rows_come_from_their_parts_stores(cfg: Config) -> None:
    data = loader.TrainData.open(cfg, prepare_mixture.prepare_parts(cfg))
    for rows in (None, np.arange(1, BATCH, 3), np.arange(0)):
        windows_NBW, _ = data.read(range(2, 5), rows)
        for step, windows_BW in zip(range(2, 5), windows_NBW, strict=True):
            parts_B, ids_B = data.order.places(step, rows)
            assert letters_of(windows_BW) == ["ab"[part] for part in parts_B]
            for row, part, start in zip(windows_BW, parts_B, ids_B * SEQ, strict=True):
                alone = data.readers[part].windows(np.array([start]), SEQ + 1)
                np.testing.assert_array_equal(row, alone[0])
    assert letters_of(data.read(range(1))[0][0]) == ["a"] * 3 + ["b"] * 7
    assert set(data.epochs(5)) == {"epochs/a", "epochs/b"}


def test_stores_are_made_once_and_shared(cfg: Config, tmp_path: Path, monkeypatch) -> None:
    made = prepare_mixture.prepare_parts(cfg)
    assert set(made.parts) == {"a", "b"}
    alone = replace(
        cfg, data=DataConfig(sources=cfg.data.mixture["a"].sources, store=f"{cfg.data.store}/a")
    )
    monkeypatch.setattr(prepare, "_prepare", None)  # nothing is made again
    assert prepare.prepare(alone) == made.parts["a"]
    other = changed(cfg, "a", store=f"{cfg.data.store}/a", weight=1.0)
    other = changed(other, "b", store=f"{cfg.data.store}/b")
    other = replace(other, data=replace(other.data, store=str(tmp_path / "elsewhere")))
    assert prepare_mixture.prepare_parts(other) == made == mixture.read_manifests(other)


def test_a_tokenizer_is_trained_on_all_parts_by_their_weights(cfg: Config) -> None:
    settings = TokenizerConfig(kind="huggingface", algorithm="byte_bpe", vocab_size=261)
    cfg = replace(cfg, tokenizer=settings)
    made = prepare_mixture.prepare_parts(cfg)
    shared = tokenizers.load(Path(cfg.data.store))
    assert {part.tokenizer["sha256"] for part in made.parts.values()} == {shared.fingerprint}
    for text in ("aa aa", "bb bb"):  # pieces of both parts
        assert len(shared.encode(text)) < len(text)
    assert prepare_mixture.prepare_parts(cfg) == made
    (Path(cfg.data.store) / "b" / store.MANIFEST).unlink()
    with pytest.raises(MismatchError, match="holds a store of other data"):
        prepare_mixture.prepare_parts(replace(cfg, tokenizer=replace(settings, vocab_size=260)))


def test_a_store_of_one_source_is_never_overwritten_by_a_mixture(cfg: Config) -> None:
    settings = TokenizerConfig(kind="huggingface", algorithm="byte_bpe", vocab_size=259)
    alone = DataConfig(sources=cfg.data.mixture["a"].sources, store=cfg.data.store)
    prepare.prepare(replace(cfg, tokenizer=settings, data=alone))
    before = tokenizers.load(Path(cfg.data.store)).fingerprint
    with pytest.raises(MismatchError, match=r"has a manifest.json that is no mixture's"):
        prepare_mixture.prepare_parts(replace(cfg, tokenizer=replace(settings, vocab_size=261)))
    assert tokenizers.load(Path(cfg.data.store)).fingerprint == before


def test_a_part_without_text_gives_its_tokenizer_to_the_others(cfg: Config, tmp_path: Path) -> None:
    settings = TokenizerConfig(kind="huggingface", algorithm="byte_bpe", vocab_size=259)
    made = str(tmp_path / "made")
    alone = DataConfig(sources=cfg.data.mixture["a"].sources, store=made)
    known = prepare.prepare(replace(cfg, tokenizer=settings, data=alone))
    mixed = changed(replace(cfg, tokenizer=settings), "a", store=made)
    parts = prepare_mixture.prepare_parts(mixed).parts
    assert parts["a"] == known
    assert parts["b"].tokenizer == known.tokenizer


def test_the_order_in_which_parts_are_named_changes_no_batch(cfg: Config) -> None:
    turned = dict(reversed(cfg.data.mixture.items()))
    other = replace(cfg, data=replace(cfg.data, mixture=turned))
    assert list(turned) != list(cfg.data.mixture)
    manifests = prepare_mixture.prepare_parts(cfg)
    batches = [loader.TrainData.open(c, manifests).read(range(3))[0] for c in (cfg, other)]
    np.testing.assert_array_equal(*batches)
    words = ["--data.mixture.c-d.sources", "x", "--data.mixture.a.weight", "2"]
    named = config.override(cfg, words, "gptjax train").data.mixture
    assert list(named) == ["a", "b", "c-d"]


def test_stores_of_different_tokenizers_are_refused(cfg: Config, tmp_path: Path) -> None:
    settings = TokenizerConfig(kind="huggingface", algorithm="byte_bpe", vocab_size=259)
    stores = {}
    for name, part in cfg.data.mixture.items():
        stores[name] = str(tmp_path / f"store {name}")
        prepare.prepare(
            replace(
                cfg, tokenizer=settings, data=DataConfig(sources=part.sources, store=stores[name])
            )
        )
    tokenizers.load(Path(stores["a"])).save(tmp_path)
    given = replace(settings, path=str(tmp_path))
    mixed = replace(changed(changed(cfg, "a", store=stores["a"]), "b", store=stores["b"]))
    with pytest.raises(MismatchError, match=r"store b holds a store of other data"):
        prepare_mixture.prepare_parts(replace(mixed, tokenizer=given))


def test_a_part_too_small_for_its_limit_is_named(cfg: Config) -> None:
    cfg = changed(cfg, "a", epochs=0.01)
    with pytest.raises(DataError, match=r"data.mixture.a.epochs=0.01: its \d+ windows are fewer"):
        loader.TrainData.open(cfg, prepare_mixture.prepare_parts(cfg))


def test_a_schedule_that_does_not_fit_into_a_shorter_run_is_refused(cfg: Config) -> None:
    cfg = changed(cfg, "a", epochs=1.0)
    cfg = replace(cfg, data=replace(cfg.data, exhausted="stop"))
    order = loader.TrainData.open(cfg, prepare_mixture.prepare_parts(cfg)).order
    tokens = order.leaves["a"] * BATCH * SEQ
    longer = replace(cfg, train=replace(cfg.train, tokens=10 * tokens))
    late = replace(longer, optim=replace(cfg.optim, warmup_tokens=2 * tokens))
    with pytest.raises(ConfigError, match=f"optim.warmup_tokens={2 * tokens}: above train.tokens"):
        mixture.limited(late, order, print)


@pytest.mark.parametrize("exhausted", ["renormalize", "stop"])
def test_what_a_limit_does_is_told_at_the_start(cfg: Config, exhausted) -> None:
    cfg = changed(cfg, "a", epochs=1.0)
    cfg = replace(cfg, data=replace(cfg.data, exhausted=exhausted))
    order = loader.TrainData.open(cfg, prepare_mixture.prepare_parts(cfg)).order
    assert order.leaves.keys() == {"a"}
    step = order.leaves["a"]
    longer = replace(cfg, train=replace(cfg.train, tokens=(step + 20) * BATCH * SEQ))
    told: list[str] = []
    limited = mixture.limited(longer, order, told.append)
    assert told[0].startswith("data.mixture.a: 0.3000 of the tokens, ")
    if exhausted == "stop":
        assert limited.steps == step
        assert f"after step {step} of {step + 20}: the run ends there" in told[-1]
    else:
        assert limited == longer
        assert f"leaves the mixture after step {step}" in told[0]
    told.clear()
    shorter = replace(cfg, train=replace(cfg.train, tokens=step * BATCH * SEQ))
    assert mixture.limited(shorter, order, told.append) == shorter
    assert not any("leaves" in line or "ends" in line for line in told)


def test_manifests_of_a_run_are_read_back(cfg: Config) -> None:
    made = prepare_mixture.prepare_parts(cfg)
    read = mixture.parse(json.dumps(made.as_json()).encode(), "data.json", "remedy")
    assert read == made
    alone = mixture.Manifests({"": made.parts["a"]})
    assert mixture.parse(json.dumps(alone.as_json()).encode(), "data.json", "remedy") == alone
    for text in (b"{", b"[]", b'{"mixture": {}}', b'{"mixture": {"a": 1}}', b'{"mixture": 3}'):
        with pytest.raises(DataError, match=r"data.json is damaged .* remedy"):
            mixture.parse(text, "data.json", "remedy")


# --- the configuration -----------------------------------------------------------------------


def test_parts_can_be_named_on_the_command_line() -> None:
    words = ["--data.mixture.web.sources", "a", "b", "--data.mixture.web.weight", "0.7"]
    words += ["--data.mixture.code.sources", "c", "--data.mixture.code.epochs", "2"]
    made = config.override(Config(), words, "gptjax train")
    assert made.data.mixture == {
        "web": MixturePart(weight=0.7, sources=("a", "b")),
        "code": MixturePart(sources=("c",), epochs=2.0),
    }
    made.check()
    again = config.override(made, ["--data.mixture.code.weight", "0.1"], "gptjax train")
    assert again.data.mixture["code"] == MixturePart(weight=0.1, sources=("c",), epochs=2.0)
    assert config.from_dict(json.loads(json.dumps(config.to_dict(again)))) == again


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"weight": 0.0}, "data.mixture.a.weight=0.0: must be above 0"),
        ({"weight": float("nan")}, "data.mixture.a.weight=nan: must be above 0"),
        ({"weight": float("inf")}, "data.mixture.a.weight=inf: must be finite"),
        ({"epochs": -1.0}, "data.mixture.a.epochs=-1.0: must not be negative"),
        ({"sources": ()}, "data.mixture.a.sources=(): give at least one source"),
        ({"store": "same"}, "data.mixture.b.store=same: is that of data.mixture.a too"),
        ({"sources": ("http://x/y",)}, "data.mixture.a.sources=http://x/y: gptjax reads local"),
    ],
)
def test_a_part_that_cannot_be_used_is_named(cfg: Config, fields, wanted: str) -> None:
    cfg = changed(cfg, "b", store="same")
    with pytest.raises(ConfigError) as caught:
        changed(cfg, "a", **fields).check()
    (problem,) = caught.value.problems
    assert problem.startswith(wanted)


def test_what_a_mixture_replaces_is_refused_beside_it(cfg: Config) -> None:
    given = replace(cfg, data=replace(cfg.data, sources=("x",), valid_sources=("y",)))
    with pytest.raises(ConfigError) as caught:
        given.check()
    names = [problem.partition("=")[0] for problem in caught.value.problems]
    assert names == ["data.sources", "data.valid_sources"]
    for name in ("a b", "a/b", "", "-a"):
        parts = {name: MixturePart(sources=("x",))}
        with pytest.raises(ConfigError, match="the name of a part has letters"):
            replace(cfg, data=replace(cfg.data, mixture=parts)).check()
    with pytest.raises(ConfigError, match=r"data.exhausted=stop: requires data.mixture"):
        Config(data=DataConfig(exhausted="stop")).check()
    values = {"data": {"mixture": {"a": {"wieght": 1}}}}
    with pytest.raises(ConfigError, match=r"data.mixture.a.wieght: unknown field; did you mean"):
        config.from_dict(values)


def test_a_part_may_be_too_short_for_a_stage_that_does_not_use_it(cfg: Config, tmp_path) -> None:
    for number in range(3):  # one of which may be held out
        (tmp_path / "a" / f"more{number}.txt").write_text("aa " * (2000 + number))
    long = StageConfig(seq_len=4096, batch_tokens=8192, weights={"a": 1.0})
    staged = replace(cfg, stages={"main": StageConfig(tokens=1600), "long": long})
    data = loader.TrainData.open(staged, prepare_mixture.prepare_parts(staged))
    assert letters_of(data.read(range(10, 11))[0][0]) == ["a", "a"]
    both = replace(staged, stages=staged.stages | {"long": replace(long, weights={})})
    with pytest.raises(DataError, match=r"store/b: \d+ training tokens, too few for a window of"):
        loader.TrainData.open(both, prepare_mixture.prepare_parts(both))
