"""Byte-level BPE in the files of other trainers, as a tokenizer.json of the same ids.

    vocab.json, merges.txt          GPT-2's vocabulary and merges, as `transformers` names them
    encoder.json, vocab.bpe         the same, as they were published (Radford et al. 2019)
    *.tiktoken, tokenizer.model     lines of a piece in base64 and its rank (tiktoken; Llama 3)

A rank file says neither how text is split before it is merged nor the special tokens: both follow
from its number of ranks, which is another one for each published vocabulary.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjax.errors import DataError
from gptjax.tokenizer.interface import FILES
from gptjax.tokenizer.to_huggingface import BYTE_LEVEL, added_token, bpe_model, byte_letters

PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_CL100K_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_END = "<|endoftext|>"


@dataclass(frozen=True)
class Encoding:
    """What a rank file leaves unsaid: how text is split, and special tokens with their roles.

    `split` is a regular expression; None: GPT-2's, which byte-level BPE has by itself.
    """

    split: str | None
    special: Mapping[str, int]
    eos: str = _END
    bos: str | None = None


def _encoding_128k() -> Encoding:
    named = {
        **{0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>"},
        **{6: "<|start_header_id|>", 7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>"},
        10: "<|python_tag|>",
    }
    reserved = iter(range(256))
    special = {
        named.get(i) or f"<|reserved_special_token_{next(reserved)}|>": 128_000 + i
        for i in range(256)
    }
    return Encoding(_CL100K_SPLIT, special, "<|end_of_text|>", "<|begin_of_text|>")


def _encodings() -> dict[int, Encoding]:
    """The published vocabularies by their number of ranks."""
    fim = {"<|fim_prefix|>": 100_258, "<|fim_middle|>": 100_259, "<|fim_suffix|>": 100_260}
    cl100k = {_END: 100_257, **fim, "<|endofprompt|>": 100_276}
    return {
        50_256: Encoding(None, {_END: 50_256}),
        100_256: Encoding(_CL100K_SPLIT, cl100k),
        128_000: _encoding_128k(),
    }


def is_ranks(file: Path) -> bool:
    """Whether a file is a rank file, by its first line."""
    try:
        with file.open("rb") as stream:
            piece, rank = stream.readline(4096).split()
        base64.b64decode(piece, validate=True)
        return rank.isdigit()
    except (OSError, ValueError, binascii.Error):
        return False


def find(path: Path) -> Path | None:
    """The vocabulary or rank file of a path or of a folder; None where there is none."""
    inside = [path / first for first, second in PAIRS if (path / second).is_file()]
    candidates = inside if path.is_dir() else [path]
    if path.is_dir():
        candidates += [path / "tokenizer.model", *sorted(path.glob("*.tiktoken"))]
    for file in candidates:
        if file.is_file() and (_pair_of(file) or is_ranks(file)):
            return file
    return None


def _pair_of(file: Path) -> tuple[Path, Path] | None:
    """Vocabulary and merges, where a file is one of the two."""
    for pair in PAIRS:
        if file.name in pair and all((file.parent / name).is_file() for name in pair):
            return file.parent / pair[0], file.parent / pair[1]
    return None


def read(file: Path) -> dict[str, bytes]:
    """Contents of tokenizer.json and of its special tokens' file, by name. Raises DataError."""
    try:
        if pair := _pair_of(file):
            return _from_merges(*pair)
        return _from_ranks(file)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from None


def _from_merges(vocabulary: Path, merges: Path) -> dict[str, bytes]:
    try:
        vocab = json.loads(vocabulary.read_text())
        lines = merges.read_text().split("\n")
        pairs = [line.split() for line in lines[lines[0].startswith("#version") :] if line.strip()]
        known = all(isinstance(token, int) for token in vocab.values())
    except (ValueError, AttributeError) as error:
        raise DataError(f"{vocabulary}: is damaged: {error}") from None
    if not known or any(len(pair) != 2 or "".join(pair) not in vocab for pair in pairs):
        raise DataError(f"{merges}: its merges are not those of {vocabulary}")
    if _END not in vocab:
        raise DataError(f"{vocabulary}: has no {_END}, which ends documents")
    return _files(vocab, pairs, Encoding(None, {_END: vocab[_END]}), whole_words=False)


def _from_ranks(file: Path) -> dict[str, bytes]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(f"{file}:{number}: is no piece in base64 and its rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DataError(f"{file}: its ranks are not 0 to {len(ranks) - 1}, each once")
    encodings = _encodings()
    encoding = encodings.get(len(ranks))
    if encoding is None:
        known = ", ".join(f"{count:,}" for count in encodings)
        raise DataError(
            f"{file}: has {len(ranks):,} ranks, and how text is split is known for vocabularies "
            f"of {known} ranks; make a tokenizer.json of it"
        )
    return _files(*vocabulary_of(ranks), encoding, whole_words=True)


def vocabulary_of(ranks: Mapping[bytes, int]) -> tuple[dict[str, int], list[list[str]]]:
    """Vocabulary and merges of ranks.

    tiktoken merges the neighbours that give the piece of the lowest rank, however that piece was
    made: so every cut of a piece into two others is a merge, in the order of the pieces' ranks.
    """
    letters = byte_letters()
    spell = {piece: "".join(letters[byte] for byte in piece) for piece in ranks}
    merges = []
    for piece in sorted(ranks, key=ranks.__getitem__):
        cuts = [
            (ranks[piece[:i]], ranks[piece[i:]], i)
            for i in range(1, len(piece))
            if piece[:i] in ranks and piece[i:] in ranks
        ]
        merges += [[spell[piece[:i]], spell[piece[i:]]] for _, _, i in sorted(cuts)]
    return {spell[piece]: rank for piece, rank in ranks.items()}, merges


def _files(
    vocab: Mapping[str, int], merges: list[list[str]], encoding: Encoding, *, whole_words: bool
) -> dict[str, bytes]:
    """The files; `whole_words` as `bpe_model` takes it."""
    words: Any = BYTE_LEVEL | {"use_regex": True}
    if encoding.split:
        split = {"type": "Split", "pattern": {"Regex": encoding.split}, "behavior": "Isolated"}
        parts = [split | {"invert": False}, BYTE_LEVEL | {"use_regex": False}]
        words = {"type": "Sequence", "pretokenizers": parts}
    made = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(i, text) for text, i in encoding.special.items()],
        "normalizer": None,
        "pre_tokenizer": words,
        "post_processor": None,
        "decoder": BYTE_LEVEL | {"use_regex": True},
        # Special tokens too, or the library would number them without gaps.
        "model": bpe_model(dict(vocab) | dict(encoding.special), merges, whole_words=whole_words),
    }
    declared = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": encoding.eos}
    if encoding.bos:
        declared["bos_token"] = encoding.bos
    return {
        "tokenizer_config.json": json.dumps(declared, indent=2).encode(),
        FILES["huggingface"]: json.dumps(made, ensure_ascii=False).encode(),
    }
