"""Mixtures of data: several token stores, one for each part, with one tokenizer.

    STORE/mixture.json        the settings that the tokenizer was trained with, if it was
    STORE/tokenizer.*         the tokenizer, if it was trained
    STORE/NAME/               the token store of a part (store.py), unless it lies elsewhere

Data without a mixture are one part, which has no name.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from etils import epath

from gptjax import tokenizer as tokenizers
from gptjax.config import Config
from gptjax.data import prepare, sources, store
from gptjax.data.journal import JOURNAL, LOCK, check_same
from gptjax.data.mixture_order import MixtureOrder, PartWindows, rows_of
from gptjax.data.split import Split
from gptjax.data.store import Manifest
from gptjax.errors import DataError, MismatchError, OutputError
from gptjax.runtime import file_lock
from gptjax.tokenizer import FILES, Tokenizer

MIXTURE = "mixture.json"


def part_configs(cfg: Config) -> dict[str, Config]:
    """The configuration of each part's store, by the part's name; in the order of the names, which
    no change of a configuration's order changes."""
    data, tokenizer = cfg.data, cfg.tokenizer
    if not data.mixture:
        return {"": cfg}
    if tokenizer.kind != "bytes" and not tokenizer.path:
        tokenizer = replace(tokenizer, path=data.store)  # trained on all parts, and kept there
    return {
        name: replace(
            cfg,
            tokenizer=tokenizer,
            data=replace(
                data,
                sources=part.sources,
                valid_sources=part.valid_sources,
                text_field=part.text_field or data.text_field,
                store=part.store or f"{data.store}/{name}",
                mixture={},
                exhausted="renormalize",
            ),
        )
        for name, part in sorted(data.mixture.items())
    }


@dataclass(frozen=True)
class Manifests:
    """The manifests of all parts of a run's data, by name; all of them have one tokenizer."""

    parts: Mapping[str, Manifest]

    @property
    def tokenizer(self) -> dict[str, Any]:
        """The tokenizer of all parts."""
        return next(iter(self.parts.values())).tokenizer

    @property
    def eos_id(self) -> int:
        """The token that ends each document."""
        return next(iter(self.parts.values())).eos_id

    @property
    def start_id(self) -> int:
        """The token that opens each document."""
        return next(iter(self.parts.values())).start_id

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 that identifies each part's tokens and their tokenizer."""
        return {name: part.fingerprint() for name, part in self.parts.items()}

    def as_json(self) -> dict[str, Any]:
        """What `parse` reads: of a run without a mixture, its store's manifest."""
        values = {name: asdict(part) for name, part in self.parts.items()}
        return values.get("", {"mixture": values})


def parse(text: bytes, place: str, remedy: str) -> Manifests:
    """The manifests in a JSON text, which errors call `place`. Raises DataError."""
    try:
        values = json.loads(text)
        parts = values["mixture"] if isinstance(values, dict) and "mixture" in values else None
        texts = {"": text} if parts is None else {k: json.dumps(v) for k, v in parts.items()}
        if not texts:
            raise ValueError("a mixture without parts")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{place} is damaged ({str(error)[:200]}); {remedy}") from None
    return Manifests({k: store.parse_manifest(v, place, remedy) for k, v in texts.items()})


def read_manifests(cfg: Config) -> Manifests:
    """The manifests of the configured stores. Raises DataError where one is missing or damaged."""
    parts = part_configs(cfg)
    return Manifests({name: store.read_manifest(c.data.store) for name, c in parts.items()})


def prepare_parts(
    cfg: Config,
    tell: prepare.Tell = lambda *_: None,
    say: Callable[[str], None] = lambda line: None,
    clock: prepare.Clock = lambda *_: None,
    begun_with: Mapping[str, str] | None = None,
) -> Manifests:
    """Prepares the store of each part that is not finished; the manifests of all.

    The tokenizer of a mixture is that of the stores that are there; without any, it is trained
    first, on text of all parts by their weights. `begun_with` has the fingerprints of the stores
    that a run was begun with. Raises what `prepare.prepare` raises, and MismatchError for stores of
    different tokenizers.
    """
    parts, begun = part_configs(cfg), begun_with or {}
    is_made = lambda c: "://" in c.data.store or (Path(c.data.store) / store.MANIFEST).exists()
    made_before = [c.data.store for c in parts.values() if is_made(c)]
    own = cfg.tokenizer.kind != "bytes" and not cfg.tokenizer.path
    if cfg.data.mixture and own and len(made_before) < len(parts):
        _make_tokenizer(cfg, parts, made_before, tell, say)
    made: dict[str, Manifest] = {}
    for name, part in parts.items():
        told = (lambda phase, *done, name=name: tell(f"{phase} {name}", *done)) if name else tell
        made[name] = prepare.prepare(part, told, say, clock, begun.get(name))
    first, *others = made
    for name in others:
        if made[name].tokenizer != made[first].tokenizer:
            raise MismatchError(
                f"data.mixture.{name}: its store has another tokenizer than that of "
                f"data.mixture.{first}; give both --tokenizer.path, or another store"
            )
    return Manifests(made)


def _make_tokenizer(
    cfg: Config,
    parts: Mapping[str, Config],
    made_before: Sequence[str],
    tell: prepare.Tell,
    say: Callable[[str], None],
) -> None:
    """Puts the tokenizer of a mixture into data.store, unless it is there already.

    Raises MismatchError where the folder holds another store or tokenizer.
    """
    folder, made = Path(cfg.data.store), Path(cfg.data.store) / MIXTURE
    mixture = {name: prepare.identity(part) for name, part in parts.items()}
    weights = {name: part.weight for name, part in cfg.data.mixture.items()}
    for values in mixture.values():
        del values["tokenizer"]
    settings = {"tokenizer": asdict(cfg.tokenizer), "weights": weights, "parts": mixture}
    settings = json.loads(json.dumps(settings))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock.held(folder / LOCK, f"data.store={folder}", say):
            others = [
                n for n in (store.MANIFEST, JOURNAL, *FILES.values()) if (folder / n).exists()
            ]
            if made.exists():
                check_same(folder, json.loads(made.read_text()), settings)
                if any(name in others for name in FILES.values()):
                    return
            elif others:
                raise MismatchError(
                    f"data.store={folder}: has a {others[0]} that is no mixture's; give another "
                    "--data.store"
                )
            store.replace_file(made, json.dumps(settings, indent=2))
            if made_before:
                tokenizer = tokenizers.load(epath.Path(made_before[0]))
                say(f"data.mixture: the tokenizer is that of {made_before[0]}")
            else:
                tokenizer = _trained(cfg, parts, tell)
            tokenizer.save(folder)
    except OSError as error:
        raise OutputError(f"data.store={folder}: cannot be written: {error}") from None


def _trained(cfg: Config, parts: Mapping[str, Config], tell: prepare.Tell) -> Tokenizer:
    """A tokenizer that is trained on text of all parts, of each by its weight."""
    samples, total = [], sum(part.weight for part in cfg.data.mixture.values())
    for name, part in parts.items():
        share = cfg.data.mixture[name].weight / total
        size = max(1, round(cfg.tokenizer.sample_bytes * share))
        sampled = replace(part, tokenizer=replace(cfg.tokenizer, sample_bytes=size))
        held_out = sources.resolve(part.data.valid_sources, f"data.mixture.{name}.valid_sources")
        found = sources.resolve(part.data.sources, f"data.mixture.{name}.sources")
        found = sources.without(found, held_out)
        split = Split.of(part, found, held_out)
        told = lambda phase, *done, name=name: tell(f"{phase} {name}", *done)
        samples.append(prepare.tokenizer_sample(sampled, found, split, told))
    return tokenizers.train(itertools.chain.from_iterable(samples), cfg.tokenizer)


def order(cfg: Config, windows: Mapping[str, int]) -> MixtureOrder:
    """The configured order of parts with so many training windows.

    Raises DataError for a part that its limit leaves less than its share of one batch.
    """
    parts = []
    for name, count in windows.items():
        part = cfg.data.mixture.get(name)
        weight, epochs = (1.0, 0.0) if part is None else (part.weight, part.epochs)
        parts.append(PartWindows(name, count, weight, rows_of(epochs, count)))
    made = MixtureOrder(tuple(parts), cfg.train.batch, cfg.train.seed, cfg.data.exhausted == "stop")
    for name, step in made.leaves.items():
        if step == 0:
            raise DataError(
                f"data.mixture.{name}.epochs={cfg.data.mixture[name].epochs}: its {windows[name]} "
                f"windows are fewer than its share of a single batch; raise it, or lower "
                f"data.mixture.{name}.weight"
            )
    return made


def limited(cfg: Config, made: MixtureOrder, say: Callable[[str], None]) -> Config:
    """The configuration with as many tokens as the mixture has; tells what it does and when.

    Raises ConfigError where the schedule does not fit into these tokens.
    """
    if not cfg.data.mixture:
        return cfg
    steps = cfg.train.steps if made.steps is None else min(cfg.train.steps, made.steps)
    total = sum(part.weight for part in made.parts)
    for part in made.parts:
        epochs = made.epochs(steps)[part.name]
        leaves = made.leaves.get(part.name)
        say(
            f"data.mixture.{part.name}: {part.weight / total:.4f} of the tokens, {part.windows:,} "
            f"windows, {epochs:.2f} epochs in {steps:,} steps"
            + (f"; leaves the mixture after step {leaves:,}" if leaves and leaves < steps else "")
        )
    if steps == cfg.train.steps:
        return cfg
    tokens = steps * cfg.train.batch_tokens
    say(
        f"data.mixture: its parts have no more text by their epochs after step {steps:,} of "
        f"{cfg.train.steps:,}: the run ends there, and so does its learning-rate schedule "
        f"({tokens:,} tokens)"
    )
    shorter = replace(cfg, train=replace(cfg.train, tokens=tokens))
    shorter.check()  # for one, that the schedule's warm-up and decay still find room
    return shorter
