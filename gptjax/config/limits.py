"""Limits of any value of a configuration, so that none is taken for what it cannot be."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

_LARGEST = 2**53  # of an integer: beyond it, a float cannot tell it from the next
_MODEL_LIMITS = {"layers": 2**17, "vocab_size": 2**31, "context": 2**31}
_SCHEMES = ("gs", "s3")
_WIDEST = 2**24  # of every other size of a model


def out_of_range(section: Any, prefix: str = "") -> Iterator[str]:
    """Problems of numbers that are too large or not finite, and of texts that no file can hold."""
    values = section if isinstance(section, Mapping) else vars(section)
    for name, value in values.items():
        dotted = f"{prefix}{name}"
        if dataclasses.is_dataclass(value) or isinstance(value, Mapping):
            yield from out_of_range(value, f"{dotted}.")
        for one in value if isinstance(value, tuple) else (value,):
            if isinstance(one, float) and not math.isfinite(one):
                yield f"{dotted}={one}: must be finite"
            elif isinstance(one, int) and abs(one) > _LARGEST:
                yield f"{dotted}={one}: must be at most 2**53"
            elif isinstance(one, str) and (why := unusable(one)):
                yield f"{dotted}={one!r}: {why}"


def unusable(text: str) -> str:
    """Why a text cannot be written to a file, or name one; empty if it can."""
    if "\0" in text:
        return "holds a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "is no valid UTF-8 text"
    return ""


def unknown_scheme(place: str) -> str:
    """Why a place is no file that gptjax reads; empty for a path and a bucket that it does."""
    scheme, address, _ = place.partition("://")
    if not address or scheme in _SCHEMES:
        return ""
    return f"gptjax reads local files, gs:// and s3://, no {scheme}://"


def too_large(model: Any) -> Iterator[str]:
    """Problems of a model's sizes that no machine has memory for."""
    for name, value in vars(model).items():
        limit = _MODEL_LIMITS.get(name, _WIDEST)
        if isinstance(value, int) and not isinstance(value, bool) and value > limit:
            yield f"model.{name}={value}: must be at most {limit}"


def place_problems(cfg: Any) -> Iterator[str]:
    """Problems of the names of folders and files, and of a tokenizer's size."""
    if cfg.tokenizer.vocab_size > _WIDEST:
        yield f"tokenizer.vocab_size={cfg.tokenizer.vocab_size}: must be at most {_WIDEST}"
    if why := unknown_scheme(cfg.run):
        yield f"run={cfg.run}: {why}"
    if cfg.checkpoint.local and "://" not in cfg.run:
        yield (
            f"checkpoint.local={cfg.checkpoint.local}: is beside a run in a bucket, and "
            f"run={cfg.run} is a folder; leave it empty"
        )
    for name, value in {"run": cfg.run, "data.store": cfg.data.store}.items():
        if not value:
            yield f"{name}={value!r}: is empty; give a folder"
    sources = {"data.sources": cfg.data.sources, "data.valid_sources": cfg.data.valid_sources}
    for name, part in cfg.data.mixture.items():
        sources[f"data.mixture.{name}.sources"] = part.sources
        sources[f"data.mixture.{name}.valid_sources"] = part.valid_sources
    for name, patterns in {**sources, "data.store": (cfg.data.store,)}.items():
        for pattern in patterns:
            if why := unknown_scheme(pattern):
                yield f"{name}={pattern}: {why}"
            elif not pattern and name != "data.store":
                yield f"{name}={pattern!r}: is empty; give a file, a folder or a pattern"
