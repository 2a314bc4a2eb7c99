"""tokenizer.json, the format of the `tokenizers` library, from a tokenizer of any kind."""

import base64
import json
from typing import Any

from gptjax.tokenizer.huggingface import HuggingFaceTokenizer
from gptjax.tokenizer.interface import FILES, ByteTokenizer, Tokenizer
from gptjax.tokenizer.sentencepiece import SentencePieceTokenizer, parse_model

Json = dict[str, Any]

_SPACE = "\u2581"  # SentencePiece's sign for a space
_SPELLED_BYTE = "<(?=0x[0-9A-F]{2}>)"  # the first character of the text "<0x41>"


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """The contents of a tokenizer.json with the ids and texts of a tokenizer.

    It puts before a text what a prompt of the run begins with. A Unigram model whose scores are not
    multiples of a power of two may cut a few texts otherwise: SentencePiece adds scores in float32,
    `tokenizers` in float64, and two sums may be equal in one of them alone.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        given = tokenizer.files()[FILES["huggingface"]]
        if tokenizer.starts_by_itself:
            return given
        made, start = json.loads(given), tokenizer.start_id
        assert start is not None
    else:
        start = tokenizer.prefix_id
        made = {"version": "1.0", "truncation": None, "padding": None, "post_processor": None}
        if isinstance(tokenizer, SentencePieceTokenizer):
            made |= _sentencepiece(parse_model(tokenizer.serialized()))
        else:
            assert isinstance(tokenizer, ByteTokenizer)
            made |= _bytes(tokenizer)
    template = _template(tokenizer.piece(start), start)
    own = made["post_processor"]
    if own is not None and own["type"] == "ByteLevel":  # which adds no token
        template = {"type": "Sequence", "processors": [own, template]}
    made["post_processor"] = template
    return json.dumps(made, ensure_ascii=False, indent=2).encode()


def _template(content: str, token: int) -> Json:
    """A post-processor that puts a token before a text, or before a pair of texts."""
    first: Json = {"SpecialToken": {"id": content, "type_id": 0}}
    one, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [first, one],
        "pair": [first, one, other],
        "special_tokens": {content: {"id": content, "ids": [token], "tokens": [content]}},
    }


def added_token(token: int, content: str, *, special: bool = True) -> Json:
    """An entry of added_tokens."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": content, **flags, "special": special}


def _bytes(tokenizer: ByteTokenizer) -> Json:
    """Byte-level BPE without merges."""
    shown = {letter: byte for byte, letter in enumerate(byte_letters())}
    special = [(token, tokenizer.piece(token)) for token in range(256, tokenizer.vocab_size)]
    return {
        "added_tokens": [added_token(token, content) for token, content in special],
        "normalizer": None,
        "pre_tokenizer": BYTE_LEVEL | {"use_regex": False},
        "decoder": BYTE_LEVEL | {"use_regex": False},
        "model": bpe_model(shown | {content: token for token, content in special}, []),
    }


BYTE_LEVEL: Json = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
"""The pre-tokenizer, or decoder, of byte-level BPE."""


def bpe_model(vocab: Json, merges: list[list[str]], *, whole_words: bool = False) -> Json:
    """A BPE model; with `whole_words`, a word that is a piece is it, whatever its merges."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": whole_words,
        "vocab": vocab,
        "merges": merges,
    }


def byte_letters() -> list[str]:
    """The character that byte-level BPE writes for each byte (Radford et al. 2019).

    Printable bytes of Latin-1 stand for themselves, the others for characters from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _sentencepiece(proto: Any) -> Json:
    """The model, its normalisation and its special tokens from SentencePiece's protocol buffer."""
    kind, spec, trainer = type(proto).SentencePiece, proto.normalizer_spec, proto.trainer_spec
    beside = (kind.CONTROL, kind.UNKNOWN, kind.USER_DEFINED)
    added = [
        added_token(i, p.piece, special=p.type != kind.USER_DEFINED)
        for i, p in enumerate(proto.pieces)
        if p.type in beside
    ]
    model = (_bpe if trainer.model_type == trainer.BPE else _unigram)(proto)
    before = []
    if model["type"] == "Unigram" and trainer.byte_fallback:  # or the text <0x41> becomes a byte
        split = {"type": "Split", "pattern": {"Regex": _SPELLED_BYTE}, "invert": False}
        before.append(split | {"behavior": "MergedWithPrevious"})
    spaces = _spaces(spec, symbols=any(p.type == kind.USER_DEFINED for p in proto.pieces))
    before += spaces.pop("pre_tokenizers")
    pre_tokenizer = {"type": "Sequence", "pretokenizers": before} if before else None
    return {"added_tokens": added, "pre_tokenizer": pre_tokenizer, "model": model, **spaces}


def _bpe(proto: Any) -> Json:
    """Byte-pair encoding: the merges are all ways to make a piece of two others, best first."""
    normal = [p for p in proto.pieces if p.type == type(p).NORMAL]
    known = {p.piece for p in normal}
    merges = []
    for piece in sorted(normal, key=lambda p: -p.score):
        halves = ((piece.piece[:i], piece.piece[i:]) for i in range(1, len(piece.piece)))
        merges += [pair for pair in halves if known.issuperset(pair)]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": next(p.piece for p in proto.pieces if p.type == type(p).UNKNOWN),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": proto.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": {p.piece: i for i, p in enumerate(proto.pieces)},
        "merges": merges,
    }


def _unigram(proto: Any) -> Json:
    """A Unigram model; an unknown character costs 10 more than the rarest piece, as it does there.

    Pieces that are not of text have that piece's score.
    """
    normal = type(proto.pieces[0]).NORMAL
    rarest = min((p.score for p in proto.pieces if p.type == normal), default=0.0)
    return {
        "type": "Unigram",
        "unk_id": next(i for i, p in enumerate(proto.pieces) if p.type == type(p).UNKNOWN),
        "vocab": [[p.piece, p.score if p.type == normal else rarest] for p in proto.pieces],
        "byte_fallback": proto.trainer_spec.byte_fallback,
    }


def _spaces(spec: Any, *, symbols: bool) -> Json:
    """Normalisation before encoding, and decoding.

    `symbols`: the model has pieces of the user's, at which `tokenizers` cuts a text before it is
    normalised, so that only a pre-tokenizer knows where the text begins.
    """
    space = _SPACE if spec.escape_whitespaces else " "
    steps: list[Json] = []
    if charsmap := spec.precompiled_charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": _base64(charsmap)})
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    prefix = spec.add_dummy_prefix
    first = prefix and symbols and spec.escape_whitespaces
    if prefix and not first:
        steps.append({"type": "Prepend", "prepend": " "})
    if spec.escape_whitespaces:
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": space})
    metaspace = {"type": "Metaspace", "replacement": space, "split": False}
    metaspace |= {"prepend_scheme": "first"}
    decoders: list[Json] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if spec.escape_whitespaces:
        written = {"type": "Replace", "pattern": {"String": space}, "content": " "}
        decoders.insert(0, written)
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizers": [metaspace] if first else [],
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def _base64(contents: bytes) -> str:
    return base64.b64encode(contents).decode()
