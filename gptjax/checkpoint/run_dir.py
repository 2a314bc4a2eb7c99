"""The run folder: its files, and the lock of the process that may write to it.

RUN/config.json        the resolved configuration, itself a CONFIG
RUN/tokenizer.*        the tokenizer, with the files that declare its special tokens
RUN/data.json          the manifest of the store that it is trained on, or of each part's
RUN/source.json        instead, for an imported model: its origin (see cli/convert.py)
RUN/finetune.json      instead, for a fine-tuned run: the examples that it is trained on
RUN/start.json         what it was started from, if from another model's parameters
RUN/checkpoints/       see checkpointer.py
RUN/checkpoints.json   the last step that was saved there
RUN/metrics.jsonl, RUN/tensorboard/, RUN/samples/, RUN/profile/
RUN/sessions.jsonl     what the time of each process was spent on (runtime/goodput.py)
RUN/run.lock           held while a process trains here

A run may lie in a bucket. Its head.json (head.py) then stands for checkpoints.json and run.lock,
and metrics, profiles and event files are written on this machine and uploaded (`log_folder`).
"""

import contextlib
import importlib.metadata
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from gptjax import bucket, config
from gptjax import tokenizer as tokenizers
from gptjax.checkpoint import head
from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.checkpoint.listing import (
    CERTIFICATE,
    CHECKPOINTS,
    METRICS_FILE,
    SOURCE,
    START,
    read_json,
)
from gptjax.config import CONFIG_FILE, Config
from gptjax.data import mixture, store
from gptjax.data.mixture import Manifests
from gptjax.errors import CheckpointError, DataError, MismatchError, OutputError
from gptjax.model.decoder import Params
from gptjax.model.heads import init_params
from gptjax.parallel import sharding
from gptjax.runtime import distributed, file_lock, preemption
from gptjax.runtime.goodput import SESSIONS
from gptjax.runtime.mirror import Mirror
from gptjax.tokenizer import Tokenizer

_LOCK = "run.lock"
_PROBE = ".probe"
_LEASE_S = 180
_DATA = "data.json"
_EXAMPLES = "finetune.json"


@contextmanager
def claim(cfg: Config, say: Callable[[str], None] = lambda line: None) -> Iterator[list[str]]:
    """Locks the run folder for training; yields the changes since the run began, a line each.

    Creates the folder if need be and tries a write, before anything costly. In a job of several
    processes, process 0 holds the lock for all, and the others check that they see its folder.

    Raises MismatchError if the folder holds another run, OutputError if it cannot be written or
    another job holds it, or if a process has another folder.
    """
    folder = bucket.path_of(cfg.run)
    take, check_shared = (
        (_take_head, _check_head) if bucket.remote(cfg.run) else (_take_lock, _check_shared)
    )
    with contextlib.ExitStack() as stack:
        with preemption.preemptible("it waited for the run folder"):
            with distributed.first_before_others():
                if distributed.first():
                    take(stack, cfg, say)
            check_shared(cfg)
        changes: list[str] = []
        if (folder / SOURCE).exists():
            raise MismatchError(
                f"{folder} holds an imported model; to go on training it, give --start {folder} "
                "and another --run"
            )
        steps = Checkpointer(folder / CHECKPOINTS).steps()
        if (folder / CONFIG_FILE).exists():
            saved = config.read_json(folder / CONFIG_FILE)
            changes = config.resume_changes(saved, cfg, steps[-1] if steps else 0)
        elif steps:
            raise MismatchError(f"{folder} has checkpoints but no {CONFIG_FILE}; use another --run")
        yield changes


def _take_lock(stack: contextlib.ExitStack, cfg: Config, say: Callable[[str], None]) -> None:
    """Process 0 locks the run folder until the end of `stack`, and writes its probe."""
    folder = Path(cfg.run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Over NFS, the lock of a machine that has vanished lasts for a lease.
        patience = _LEASE_S if distributed.several() else 0
        stack.enter_context(file_lock.held(folder / _LOCK, f"run={cfg.run}", say, patience))
        with (folder / _PROBE).open("w") as stream:
            stream.write(secrets.token_hex())
            os.fsync(stream.fileno())
        if (folder / head.HEAD).exists():  # a copy of a run in a bucket
            stack.enter_context(head.Head(cfg.run).taken(say))
    except OSError as error:
        raise OutputError(f"run={cfg.run}: cannot be written: {error}") from None


def _take_head(stack: contextlib.ExitStack, cfg: Config, say: Callable[[str], None]) -> None:
    """Process 0 becomes the writer of a run in a bucket until the end of `stack`."""
    patience = head.LEASE_S if distributed.several() else 0
    own = head.Head(cfg.run.rstrip("/"))
    stack.enter_context(own.taken(say, patience))
    local = cfg.checkpoint.local
    disk = Path(local).expanduser() / own.read().id / "logs" if local else None
    mirror = stack.enter_context(Mirror.kept(cfg.run, [METRICS_FILE, SESSIONS], say, disk))
    own.before_commit = mirror.upload
    _log_folders[cfg.run] = mirror.folder
    stack.callback(_log_folders.pop, cfg.run)


def _check_head(cfg: Config) -> None:
    """Raises OutputError where this process does not see what process 0 has written."""
    writer = head.of(cfg.run).read().writer
    own = writer.id if writer else ""
    if own != distributed.from_first(own):
        raise OutputError(
            f"run={cfg.run}: {distributed.name()} does not see there what process 0 has written; "
            "give all processes the same endpoint and credentials"
        )
    distributed.barrier()


def log_folder(run: str) -> Path:
    """Where process 0 writes the metrics and profiles of a run that is claimed."""
    return _log_folders.get(run, Path(run))


_log_folders: dict[str, Path] = {}  # of the claimed runs in buckets


def _check_shared(cfg: Config) -> None:
    """Raises OutputError where this process does not see the folder of process 0."""
    folder = Path(cfg.run)
    probe = folder / _PROBE
    own = probe.read_text() if probe.exists() else ""
    if own != distributed.from_first(own):
        raise OutputError(
            f"run={folder}: {distributed.name()} does not have the folder of process 0 there; put "
            "it on a path that all processes share"
        )
    distributed.barrier()
    if distributed.first():
        probe.unlink()


def record(cfg: Config, tokenizer: Tokenizer, manifests: Manifests) -> None:
    """Writes configuration, tokenizer and the stores' manifests into the run folder.

    Raises MismatchError if the folder has another tokenizer or other manifests already.
    """
    folder = bucket.path_of(cfg.run)
    check_tokenizer(
        manifests.tokenizer["sha256"], tokenizer.fingerprint, "the manifest", "the store"
    )
    known = folder / _DATA
    if known.exists():
        begun_with = _manifests(known)
        check_tokenizer(
            begun_with.tokenizer["sha256"], tokenizer.fingerprint, cfg.run, cfg.data.store
        )
        _check_tokens(cfg, begun_with, manifests)
    distributed.barrier()  # nobody looks at what is written now
    if distributed.first():
        _save_tokenizer(folder, tokenizer)
        write_json(known, manifests.as_json())
        write_json(folder / CONFIG_FILE, config.to_dict(cfg))


def _check_tokens(cfg: Config, of_run: Manifests, of_stores: Manifests) -> None:
    begun, found = of_run.fingerprints(), of_stores.fingerprints()
    for name, part in mixture.part_configs(cfg).items():
        if begun.get(name) != found[name]:
            raise MismatchError(
                f"data.store={part.data.store}: its tokens are not those that {cfg.run} was begun "
                "with; give that store, or another --run"
            )


def _manifests(file: Any) -> Manifests:
    """The manifests in a run's data.json. Raises DataError."""
    remedy = "put back that of the run, or the store's manifest.json that it was begun with"
    return mixture.parse(file.read_bytes(), str(file), remedy)


def begun_with(cfg: Config) -> dict[str, str]:
    """The fingerprints of the tokens that the run was begun with, by part; none for a new one."""
    known = bucket.path_of(cfg.run) / _DATA
    return _manifests(known).fingerprints() if known.exists() else {}


def check_store(cfg: Config, manifests: Manifests) -> None:
    """Raises DataError where a run's store is missing, MismatchError where its tokens differ."""
    _check_tokens(cfg, manifests, mixture.read_manifests(cfg))


def record_imported(cfg: Config, tokenizer: Tokenizer | None, source: dict[str, Any]) -> None:
    """Writes configuration, tokenizer and origin of an imported model."""
    folder = bucket.path_of(cfg.run)
    if tokenizer is not None:
        _save_tokenizer(folder, tokenizer)
        source = source | {"tokenizer": tokenizer.fingerprint}
    write_json(folder / SOURCE, source)
    write_json(folder / CONFIG_FILE, config.to_dict(cfg))


def record_tuned(cfg: Config, tokenizer: Tokenizer, examples: dict[str, Any]) -> None:
    """Writes configuration, tokenizer and the examples' fingerprints of a fine-tuned run.

    Raises MismatchError where the run was begun with other examples.
    """
    folder = bucket.path_of(cfg.run)
    facts = {"tokenizer": tokenizer.fingerprint, **examples}
    if tokenizer.start_id is not None and not tokenizer.starts_by_itself:
        facts["start_id"] = tokenizer.start_id
    begun_with = read_json(folder / _EXAMPLES)
    if begun_with is not None and begun_with != facts:
        differences = [
            f"{name}: {begun_with.get(name)} in the run, {value} now"
            for name, value in facts.items()
            if begun_with.get(name) != value
        ]
        raise MismatchError(
            f"{cfg.run} was begun with other examples; give those, or another --run", differences
        )
    distributed.barrier()  # nobody looks at what is written now
    if distributed.first():
        _save_tokenizer(folder, tokenizer)
        write_json(folder / _EXAMPLES, facts)
        write_json(folder / CONFIG_FILE, config.to_dict(cfg))


def start_of(folder: str) -> dict[str, Any] | None:
    """What a run was started from; None where its parameters were drawn. Raises DataError."""
    return read_json(bucket.path_of(folder) / START)


def record_start(folder: str, facts: dict[str, Any]) -> None:
    """Writes what a run is started from. Raises MismatchError where it was begun from another."""
    begun = start_of(folder)
    if begun is not None and begun != facts:
        raise MismatchError(
            f"{folder} was begun from {begun['base']}, whose parameters were others than those of "
            f"{facts['base']} are now; give that base, or another --run"
        )
    distributed.barrier()  # nobody looks at what is written now
    if distributed.first():
        write_json(bucket.path_of(folder) / START, facts)
    distributed.barrier()


def _save_tokenizer(folder: Any, tokenizer: Tokenizer) -> None:
    with _told_as_output(folder):
        if bucket.remote(folder):
            for name, contents in tokenizer.files().items():
                (folder / name).write_bytes(contents)
            return
        tokenizer.save(folder)
        for name in tokenizer.files():
            store.sync(folder / name)


def examples_of(folder: str) -> dict[str, Any]:
    """The recorded facts of a fine-tuned run's examples, empty for others. Raises DataError."""
    return read_json(bucket.path_of(folder) / _EXAMPLES) or {}


def facts(cfg: Config) -> dict[str, str]:
    """The facts that all processes of a job must agree on: versions and configuration."""
    packages = ("gptjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    versions = {f"{name}'s version": importlib.metadata.version(name) for name in packages}
    return versions | {name: repr(value) for name, value in config.flatten(cfg).items()}


def source_of(folder: str) -> dict[str, Any] | None:
    """The origin of an imported model; None for a run that was trained here. Raises DataError."""
    return read_json(bucket.path_of(folder) / SOURCE)


def certificate_of(folder: str) -> dict[str, Any] | None:
    """The run's conversion certificate; None for a trained run. Raises DataError."""
    return read_json(bucket.path_of(folder) / CERTIFICATE)


def write_json(file: Any, values: Any) -> None:
    """Writes JSON, whole or not at all, and synced to disk. Raises OutputError."""
    text = json.dumps(values, indent=2) + "\n"
    with _told_as_output(file.parent):
        if bucket.remote(file):
            file.write_text(text)
        else:
            store.replace_file(file, text)


@contextmanager
def _told_as_output(folder: Any) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error}") from None


def check_tokenizer(one: str, other: str, one_place: str, other_place: str) -> None:
    """Raises MismatchError unless two tokenizers' fingerprints agree."""
    if one != other:
        raise MismatchError(
            f"the tokenizer of {one_place} ({one[:12]}) is not that of {other_place} ({other[:12]})"
        )


def open_run(folder: str) -> tuple[Config, Tokenizer | None, Manifests | None]:
    """Configuration, tokenizer and data manifests of a run.

    An imported or fine-tuned model has no manifests; an imported one has no tokenizer if its source
    had none. Raises ConfigError, DataError, or MismatchError if the tokenizer is not the run's own.
    """
    cfg, source = replace(config.load(folder), run=folder), source_of(folder)
    if source is not None:
        if "tokenizer" not in source:
            return cfg, None, None
        return cfg, _own_tokenizer(folder, source["tokenizer"], SOURCE), None
    name = _DATA if cfg.finetune.task == "none" else _EXAMPLES
    if not (bucket.path_of(folder) / name).exists():
        raise DataError(f"{folder}: this run has no {name}, so nothing was trained in it")
    if cfg.finetune.task != "none":
        facts = examples_of(folder)
        start_id = facts.get("start_id")
        return cfg, _own_tokenizer(folder, facts["tokenizer"], _EXAMPLES, start_id), None
    manifests = _manifests(bucket.path_of(folder) / name)
    fingerprint = manifests.tokenizer["sha256"]
    return cfg, _own_tokenizer(folder, fingerprint, _DATA, manifests.start_id), manifests


def _own_tokenizer(
    folder: str, fingerprint: str, recorded_in: str, start_id: int | None = None
) -> Tokenizer:
    """The tokenizer in a run folder. Raises MismatchError for another fingerprint than recorded."""
    tokenizer = tokenizers.load(bucket.path_of(folder), start_id)
    check_tokenizer(fingerprint, tokenizer.fingerprint, f"{folder}/{recorded_in}", folder)
    return tokenizer


def restore_params(
    folder: str,
    cfg: Config,
    say: Callable[[str], None] = lambda line: None,
    step: int | None = None,
) -> tuple[Params, int]:
    """A run's parameters on the ambient mesh, and their step: from the newest valid checkpoint, or
    from that of `step`.

    The moving average where the run keeps one. Raises CheckpointError if there is no checkpoint.
    """
    checkpoints = Checkpointer(bucket.path_of(folder) / CHECKPOINTS, say=say)
    abstract = sharding.abstract(lambda: init_params(cfg, jax.random.key(0)))
    part = "ema" if cfg.train.ema_decay else "params"
    wanted = {"step": sharding.abstract(lambda: jax.numpy.int32(0)), part: abstract}
    if step is not None:
        restored = checkpoints.restore(step, wanted, partial=True)
    else:
        restored = checkpoints.restore_newest(wanted, partial=True)
    if restored is None:
        raise CheckpointError(f"{folder}: this run has no checkpoint yet")
    return restored[part], int(restored["step"])
