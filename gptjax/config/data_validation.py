"""Validation of data sources, mixtures and tokenizers.

Problems are told as in validation.py.
"""

import re
from collections.abc import Iterator
from typing import Any, Literal

ALGORITHMS: dict[Literal["sentencepiece", "huggingface"], tuple[str, ...]] = {
    "sentencepiece": ("bpe", "unigram"),
    "huggingface": ("byte_bpe", "wordpiece"),
}


def data_problems(cfg: Any) -> Iterator[str]:
    """Problems of data sources, validation split and tokenizer."""
    tokenizer, vocab_size = cfg.tokenizer, cfg.model.vocab_size
    if cfg.data.mixture:
        weighted = {part for one in cfg.stages.values() for part in one.weights}
        yield from _mixture_problems(cfg.data, weighted)
    else:
        if not cfg.data.sources:
            yield "data.sources=(): give at least one source"
        if not cfg.data.valid_sources and cfg.data.valid_fraction == 0:
            yield (
                "data.valid_fraction=0.0: no validation data; raise it, or give data.valid_sources"
            )
        if cfg.data.exhausted != type(cfg.data)().exhausted:
            yield f"data.exhausted={cfg.data.exhausted}: requires data.mixture"
    if cfg.data.packing == "documents" and cfg.data.documents != "mask":
        yield (
            f"data.packing={cfg.data.packing}: requires data.documents=mask, as the documents of a "
            "row have nothing to do with each other"
        )
    if "://" in cfg.data.cache:
        yield f"data.cache={cfg.data.cache}: must be a folder on this machine"
    if tokenizer.kind != "bytes" and not tokenizer.path:
        yield from _tokenizer_problems(tokenizer)
    needed = 258 if tokenizer.kind == "bytes" else tokenizer.vocab_size
    if not tokenizer.path and vocab_size < needed:
        yield (
            f"model.vocab_size={vocab_size}: smaller than the tokenizer's {needed}; raise it to "
            f"{needed} or more"
        )


def _mixture_problems(data: Any, weighted: set[str]) -> Iterator[str]:
    """Problems of the parts of a mixture; to those of `weighted`, stages give weights."""
    default = type(data)()
    for name in ("sources", "valid_sources"):
        if getattr(data, name) != getattr(default, name):
            yield (
                f"data.{name}={getattr(data, name)}: not used beside data.mixture; give "
                f"data.mixture.NAME.{name}"
            )
    if not any(part.weight for part in data.mixture.values()):
        yield (
            "data.mixture: all weights are 0; give those that validation text and a trained "
            "tokenizer are to have (weights of the stages go before them in training)"
        )
    stores: dict[str, str] = {}
    for name, part in data.mixture.items():
        prefix = f"data.mixture.{name}"
        if not re.fullmatch(r"\w[\w-]*", name):
            yield f"{prefix}: the name of a part has letters, digits, _ and - only"
        if not part.weight >= 0 or (part.weight == 0 and name not in weighted):
            yield f"{prefix}.weight={part.weight}: must be above 0; leave the part out instead"
        if not part.epochs >= 0:
            yield f"{prefix}.epochs={part.epochs}: must not be negative"
        if not part.sources and not part.store:
            yield f"{prefix}.sources=(): give at least one source"
        if not part.valid_sources and data.valid_fraction == 0:
            yield (
                f"{prefix}.valid_sources=(): no validation data with data.valid_fraction=0.0; give "
                "some, or raise that"
            )
        place = part.store or f"{data.store}/{name}"
        if other := stores.get(place):
            yield f"{prefix}.store={place}: is that of data.mixture.{other} too; give another"
        stores[place] = name


def _tokenizer_problems(tokenizer: Any) -> Iterator[str]:
    """Problems of a tokenizer that is to be trained."""
    algorithms = ALGORITHMS[tokenizer.kind]
    if tokenizer.algorithm not in algorithms:
        yield (
            f"tokenizer.algorithm={tokenizer.algorithm}: not available with tokenizer.kind="
            f"{tokenizer.kind}; use {' or '.join(algorithms)}"
        )
    elif tokenizer.algorithm == "byte_bpe" and 1 <= tokenizer.vocab_size < 257:
        yield (
            f"tokenizer.vocab_size={tokenizer.vocab_size}: byte_bpe needs at least 257, for 256 "
            "bytes and the end of a document"
        )
