"""Mixtures of data: several token stores, one for each part, with one tokenizer.

Data without a mixture are one part, which has no name.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from gptjax.config import Config, phases, validation
from gptjax.data import store
from gptjax.data.mixture_order import MixtureOrder, Stretch
from gptjax.data.store import Manifest
from gptjax.errors import ConfigError, DataError


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


def order(cfg: Config, windows: Callable[[str, int], int]) -> MixtureOrder:
    """The configured order of parts that have so many windows, by the part's name and their length.

    Raises DataError for a part that its limit leaves less than its share of one batch.
    """
    names, found = tuple(part_configs(cfg)), phases.phases(cfg)
    shares = {phase: phases.weights_of(cfg, phase.stage) for phase in found}
    used = {(name, phase.seq_len) for phase in found for name in names if shares[phase].get(name)}
    count = lambda name, length: windows(name, length) if (name, length) in used else 1
    stretches = tuple(
        Stretch(
            batch=phase.batch,
            windows=tuple(count(name, phase.seq_len) for name in names),
            weights=tuple(shares[phase].get(name, 0.0) for name in names),
            first=phase.first,
            seq_len=phase.seq_len,
        )
        for phase in found
    )
    epochs = tuple(part.epochs for _, part in sorted(cfg.data.mixture.items())) or (0.0,)
    stops = cfg.data.exhausted == "stop"
    made = MixtureOrder(names, stretches, cfg.train.seed, epochs, stops)
    for name, step in made.leaves.items():
        if made.epochs_at(step)[name] == 0:
            length = phases.phase_at(found, step).seq_len
            raise DataError(
                f"data.mixture.{name}.epochs={cfg.data.mixture[name].epochs}: its "
                f"{windows(name, length)} windows are fewer than its share of a single batch; "
                f"raise it, or lower data.mixture.{name}.weight"
            )
    return made


def limited(cfg: Config, made: MixtureOrder, say: Callable[[str], None]) -> Config:
    """The configuration with as many tokens as the mixture has; tells what it does and when.

    Raises ConfigError where the schedule does not fit into these tokens.
    """
    if not cfg.data.mixture:
        return cfg
    steps = cfg.steps if made.steps is None else min(cfg.steps, made.steps)
    total = sum(part.weight for part in cfg.data.mixture.values())
    for name, epochs in made.epochs_at(steps).items():
        leaves, share = made.leaves.get(name), cfg.data.mixture[name].weight / (total or 1)
        of_all = "" if cfg.stages else f"{share:.4f} of the tokens, "
        say(
            f"data.mixture.{name}: {of_all}{epochs:.2f} epochs in {steps:,} steps"
            + (f"; leaves the mixture after step {leaves:,}" if leaves and leaves < steps else "")
        )
    if steps == cfg.steps:
        return cfg
    shorter = phases.shortened(cfg, steps)
    say(
        f"data.mixture: its parts have no more text by their epochs after step {steps:,} of "
        f"{cfg.steps:,}: the run ends there, and so does its learning-rate schedule "
        f"({shorter.train.tokens:,} tokens)"
    )
    if problems := list(validation.schedule_problems(shorter)):  # of warm-up and decay, say
        raise ConfigError(problems)
    return shorter
