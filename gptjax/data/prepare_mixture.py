"""Preparation of the token stores of a mixture, and of their tokenizer.

STORE/mixture.json        the settings that the tokenizer was made with, if it was trained
STORE/tokenizer.*         the tokenizer
STORE/NAME/               the token store of a part (store.py), unless it lies elsewhere
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from gptjax import bucket
from gptjax import tokenizer as tokenizers
from gptjax.config import Config, phases
from gptjax.data import packing, prepare, prepare_remote, sources, store
from gptjax.data.journal import JOURNAL, LOCK, check_same
from gptjax.data.mixture import Manifests, part_configs
from gptjax.data.split import Split
from gptjax.data.store import Manifest
from gptjax.errors import MismatchError, OutputError
from gptjax.runtime import file_lock
from gptjax.tokenizer import FILES, Tokenizer

MIXTURE = "mixture.json"


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
    with prepare_remote.on_disk(cfg, tell, say) as local:
        return _prepare_parts(local, tell, say, clock, begun_with or {})


def _prepare_parts(
    cfg: Config,
    tell: prepare.Tell,
    say: Callable[[str], None],
    clock: prepare.Clock,
    begun: Mapping[str, str],
) -> Manifests:
    parts = part_configs(cfg)
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
    if cfg.data.packing == "documents":
        for name, part in parts.items():
            for length in {phase.seq_len for phase in phases.phases(cfg)}:
                packing.prepare(part.data.store, made[name], length, say)
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
                tokenizer = tokenizers.load(bucket.path_of(made_before[0]))
                say(f"data.mixture: the tokenizer is that of {made_before[0]}")
            else:
                tokenizer = _trained(cfg, parts, tell)
            tokenizer.save(folder)
    except OSError as error:
        raise OutputError(f"data.store={folder}: cannot be written: {error}") from None


def _trained(cfg: Config, parts: Mapping[str, Config], tell: prepare.Tell) -> Tokenizer:
    """A tokenizer that is trained on text of all parts, of each by its share of the run."""
    samples, shares = [], phases.shares_of(cfg)
    for name, part in parts.items():
        size = max(1, round(cfg.tokenizer.sample_bytes * shares[name]))
        sampled = replace(part, tokenizer=replace(cfg.tokenizer, sample_bytes=size))
        held_out = sources.resolve(part.data.valid_sources, f"data.mixture.{name}.valid_sources")
        found = sources.resolve(part.data.sources, f"data.mixture.{name}.sources")
        found = sources.without(found, held_out)
        split = Split.of(part, found, held_out)
        told = lambda phase, *done, name=name: tell(f"{phase} {name}", *done)
        samples.append(prepare.tokenizer_sample(sampled, found, split, told))
    return tokenizers.train(itertools.chain.from_iterable(samples), cfg.tokenizer)
