"""Hugging Face tokenizers: tokenizer.json with the special tokens declared beside it; training."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from gptjax.config import TokenizerConfig
from gptjax.errors import DataError
from gptjax.tokenizer.added_tokens import AddedToken, add_declared
from gptjax.tokenizer.interface import FILES, Tokenizer, slices, valid_text

_CHUNK = 1 << 17  # characters that the `tokenizers` library encodes at once, where that is exact


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library, with the special tokens declared beside it.

    EOS and BOS are the first ones declared by tokenizer_config.json, special_tokens_map.json (by
    name), generation_config.json and config.json (by id, maybe several), in this order; every
    declared EOS is a stop id.

    Tokens that are declared beside tokenizer.json and are not in it have the ids that they have in
    `transformers`. Special tokens spelled out in a document stay plain text, so that no document
    can end itself. In a prompt they become tokens, as in `transformers`.
    """

    kind = "huggingface"

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """Loads the contents of tokenizer.json and of the files beside it, given by name.

        Raises DataError if they are damaged, or declare no EOS or one outside the vocabulary.
        """
        self._files = dict(files)
        self._declared = {
            **_named(_parsed(files, "special_tokens_map.json")),
            **_named(_parsed(files, "tokenizer_config.json")),
        }
        self._added: list[AddedToken] = []
        library = self._library()
        self._ids = frozenset(library.get_vocab().values())
        needed = set(self._ids)
        for token in reversed(self._added):
            if token.needed:
                break
            needed.remove(token.id)
        self.vocab_size = 1 + max(needed, default=-1)
        added = library.get_added_tokens_decoder()
        self._special = frozenset(
            i for i, token in added.items() if token.special and i < self.vocab_size
        )
        self.bos_id = next(iter(self._token_ids(library, "bos")), None)
        self._stop_ids = self._token_ids(library, "eos")
        if not self._stop_ids:
            raise DataError(
                "no end-of-sequence token is declared, which must end documents; set eos_token in "
                "tokenizer_config.json beside tokenizer.json"
                + "".join(f" ({note})" for note in self.notes)
            )
        self.eos_id = self._stop_ids[0]
        self.unk_id = _unk_id(library)
        self._documents = _without_special_parsing(library)
        self._splits_lines = _splits_lines(library)
        if self.eos_id in self.encode(library.id_to_token(self.eos_id)):
            raise DataError(
                f"the text {library.id_to_token(self.eos_id)!r} in a document would end it; rename "
                "the end-of-sequence token to text that the pre-tokenizer splits"
            )

    def _library(self) -> Any:
        """A new `tokenizers.Tokenizer` in which every declared token is special."""
        from tokenizers import Tokenizer

        name = FILES[self.kind]
        try:
            library = Tokenizer.from_buffer(self._files.get(name, b""))
        except ValueError as error:
            raise DataError(f"{name} is damaged, or of an unknown version: {error}") from None
        library.no_truncation()
        library.no_padding()
        config, by_id = (_parsed(self._files, name) for name in ("tokenizer_config.json", _ADDED))
        self._added = add_declared(library, config, by_id, self._declared)
        return library

    @cached_property
    def _prompts(self) -> Any:
        """The library object that parses special tokens, loaded when first used."""
        return self._library()

    def _token_ids(self, library: Any, which: str) -> tuple[int, ...]:
        """The declared ids of "bos" or "eos" without repetition, in the order of the files."""
        found: list[Any] = []
        if content := self._declared.get(f"{which}_token"):
            found.append(library.token_to_id(content))
            if found[0] is None:
                raise DataError(f"{which}_token={content!r}: declared, but not in the vocabulary")
        for name in _ID_FILES:
            ids = _parsed(self._files, name).get(key := f"{which}_token_id")
            ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
            shown = "config.json" if name == _TOKEN_IDS else name
            outside = [i for i in ids if i not in self._ids]
            notes = [f"{shown}: {key}={i!r} is no token, and is left out" for i in outside]
            self.notes = (*self.notes, *notes)
            found += [i for i in ids if i in self._ids]
        return tuple(dict.fromkeys(found))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self._stop_ids

    def encode(self, text: str) -> list[int]:
        return self._encode_plain(valid_text(text))

    def _encode_plain(self, text: str) -> list[int]:
        # Only encode_batch_fast skips the offsets, which take half of the time.
        return self._documents.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _encode_long(self, text: str) -> np.ndarray:
        # In parts, because the library needs 150 bytes of memory for each byte of text.
        text, start = valid_text(text), 0
        parts: list[np.ndarray] = []
        while start < len(text) or not parts:
            end = _line_end(text, start + _CHUNK) if self._splits_lines else len(text)
            parts.append(np.array(self._encode_plain(text[start:end]), np.uint32))
            start = end
        return np.concatenate(parts)

    def decode(self, ids: Sequence[int]) -> str:
        own = [int(i) for i in ids if i < self.vocab_size and int(i) not in self._special]
        return self._documents.decode(own)

    def piece(self, token: int) -> str:
        return self._prompts.id_to_token(token) or ""

    def prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, with special tokens parsed.

        It begins with `start_id`. Without one it is as in `transformers` 5: the post-processor of
        tokenizer.json decides what is added before; add_bos_token is ignored, as there. What it
        adds behind, such as EOS, would end the text, and is left out.
        """
        if self.start_id is not None:
            return [self.start_id, *self.markup(text)]
        ids = self._prompts.encode(valid_text(text)).ids
        return ids[: len(ids) - self._count_added_after] or [self.prefix_id]

    @cached_property
    def _added_before(self) -> list[int]:
        """The special tokens that the post-processor puts before a text."""
        encoding = self._prompts.encode("a")
        return encoding.ids[: [*encoding.special_tokens_mask, 0].index(0)]

    @cached_property
    def _count_added_after(self) -> int:
        """The number of special tokens that the post-processor puts behind a text."""
        return [*reversed(self._prompts.encode("a").special_tokens_mask), 0].index(0)

    @property
    def default_start_id(self) -> int:
        return self._added_before[0] if len(self._added_before) == 1 else self.eos_id

    @property
    def starts_by_itself(self) -> bool:
        return self.start_id is None or [self.start_id] == self._added_before

    def markup(self, text: str) -> list[int]:
        """Token ids of text with spelled-out special tokens parsed, and none added."""
        return self._prompts.encode(valid_text(text), add_special_tokens=False).ids

    def markup_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `markup`, and the characters of the text that each stands for."""
        encoding = self._prompts.encode(valid_text(text), add_special_tokens=False)
        return encoding.ids, encoding.offsets

    @property
    def chat_template(self) -> str | None:
        """The chat template: chat_template.jinja, or the (default) one of tokenizer_config.json."""
        if _TEMPLATE in self._files:
            return self._files[_TEMPLATE].decode()
        given = _parsed(self._files, "tokenizer_config.json").get("chat_template")
        if isinstance(given, list):
            named = {one.get("name"): one.get("template") for one in given if isinstance(one, dict)}
            given = named.get("default")
        return given if isinstance(given, str) else None

    @property
    def named_tokens(self) -> dict[str, str]:
        """Special tokens by the names of their declarations, such as bos_token."""
        return dict(self._declared)

    def serialized(self) -> bytes:
        special: list[Any] = [self.bos_id, self.stop_ids, sorted(self._special)]
        if needed := [token for token in self._added if token.needed]:
            special.append(needed)
        return self._files[FILES[self.kind]] + b"\0" + json.dumps(special).encode()

    def files(self) -> dict[str, bytes]:
        beside = {k: v for k, v in self._files.items() if k != FILES[self.kind]}
        return {**beside, FILES[self.kind]: self._files[FILES[self.kind]]}


_TEMPLATE = "chat_template.jinja"
_ADDED = "added_tokens.json"
_TOKEN_IDS = "token_ids.json"  # special token ids of config.json, which is another file in a run
_ID_FILES = ("generation_config.json", _TOKEN_IDS)


def read_files(file: Any, made: Mapping[str, bytes] | None = None) -> dict[str, bytes]:
    """Contents by name of a tokenizer.json (`file`, of any name) and of the files beside it.

    `made` are the contents that stand for a file of another format.
    """
    found = {}
    beside = ("tokenizer_config.json", "special_tokens_map.json", _TEMPLATE, _ADDED, *_ID_FILES)
    for name in beside:
        if (path := file.parent / name).exists():
            found[name] = path.read_bytes()
    if (path := file.parent / "config.json").exists():
        config = _parsed({path.name: path.read_bytes()}, path.name)
        ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
        if ids:
            found[_TOKEN_IDS] = json.dumps(ids).encode()
    if made is None:
        return {**found, FILES["huggingface"]: file.read_bytes()}
    name = "tokenizer_config.json"
    declared = _parsed(made, name) | _parsed(found, name)
    return {**found, **made, name: json.dumps(declared, indent=2).encode()}


def _parsed(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The JSON object of a file; an empty one for an absent file. Raises DataError."""
    try:
        value = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: invalid JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{name}: not a JSON object")
    return value


def _named(declared: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens declared in a file, as strings or objects, by role."""
    found = dict(declared)
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = found.pop(key, None) or []
        items = more.items() if isinstance(more, dict) else enumerate(more)
        found |= {f"{key}_{name}_token": token for name, token in items}
    contents = {k: t.get("content") if isinstance(t, dict) else t for k, t in found.items()}
    return {k: t for k, t in contents.items() if k.endswith("_token") and isinstance(t, str) and t}


def _unk_id(library: Any) -> int | None:
    """The id of the model's token for unknown text; None where it has none."""
    from tokenizers import models

    if isinstance(library.model, models.Unigram):
        return json.loads(library.to_str())["model"]["unk_id"]
    name = getattr(library.model, "unk_token", None)
    return None if name is None else library.token_to_id(name)


def _without_special_parsing(library: Any) -> Any:
    """The same tokenizer, changed to encode spelled-out special tokens as plain text."""
    from tokenizers import Tokenizer, models

    if isinstance(library.model, models.Unigram):
        # Its vocabulary has the special tokens too, which would match text; empty ones match none.
        changed = json.loads(library.to_str())
        vocab, added = changed["model"]["vocab"], changed["added_tokens"]
        own = [token for token in added if token["special"] and token["id"] < len(vocab)]
        for token in own:
            vocab[token["id"]][0] = ""
        changed["added_tokens"] = [token for token in added if token not in own]
        library = Tokenizer.from_str(json.dumps(changed))
    library.encode_special_tokens = True
    return library


def _line_end(text: str, start: int) -> int:
    """The first line end at or after `start` that follows a letter, or the length of the text."""
    while (end := text.find("\n", start)) > 0 and not text[end - 1].isalpha():
        start = end + 1
    return end if end > 0 else len(text)


def _splits_lines(library: Any) -> bool:
    """Whether the pre-tokenizer always splits at a line end after a letter.

    Tested on examples, not proved. True of the patterns of GPT-2, Llama 3, Falcon and BERT; false
    where the text gets a prefix, or where words of several lines are encoded together.
    """
    if library.pre_tokenizer is None:
        return False
    normalize = library.normalizer.normalize_str if library.normalizer else str

    def split(text: str) -> list[str]:
        return [piece for piece, _ in library.pre_tokenizer.pre_tokenize_str(normalize(text))]

    before = ("word", "two words", "    it's", "\n\n x = 12 ab", "a.b:\n\tбуква", "日本語")
    after = ("\n", "\nword", "\n\n\n", "\n    x", "\n\n  12", "\n.\n", "\n \n語 ")
    return all(split(a + b) == split(a) + split(b) for a in before for b in after)


def train_huggingface(texts: Iterable[str], cfg: TokenizerConfig) -> HuggingFaceTokenizer:
    """Trains byte-level BPE (Radford et al. 2019) or WordPiece (Devlin et al. 2019).

    Byte-level BPE splits words like GPT-2 and is lossless. WordPiece splits and cleans text like
    BERT (cased) and is not: runs of spaces are lost, and a word with an unknown character becomes
    [UNK]. Raises DataError if the texts are too small for the vocabulary.
    """
    make = _byte_bpe if cfg.algorithm == "byte_bpe" else _wordpiece
    library, special = make(list(slices(texts)), cfg.vocab_size)
    if library.get_vocab_size() != cfg.vocab_size:
        raise DataError(
            f"tokenizer.vocab_size={cfg.vocab_size}: the text yields only "
            f"{library.get_vocab_size()} pieces; give more text, or lower it"
        )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    return HuggingFaceTokenizer(
        {
            "tokenizer_config.json": json.dumps(config, indent=2).encode(),
            FILES["huggingface"]: library.to_str(pretty=True).encode(),
        }
    )


def _byte_bpe(texts: list[str], vocab_size: int) -> tuple[Any, dict[str, str]]:
    """The trained library object, and its special tokens by role."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = {"eos_token": "<|endoftext|>"}
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return library, special


def _wordpiece(texts: list[str], vocab_size: int) -> tuple[Any, dict[str, str]]:
    """The trained library object, and its special tokens by role."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = {"eos_token": "[EOS]", "unk_token": "[UNK]"}
    library = Tokenizer(models.WordPiece(unk_token=special["unk_token"]))
    library.normalizer = normalizers.BertNormalizer(lowercase=False)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()

    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    seen = (c for c in counts if library.normalizer.normalize_str(c).strip())
    kept = sorted(seen, key=lambda c: (-counts[c], c))[: vocab_size // 8]  # each as x and ##x
    options: dict[str, Any] = {
        "initial_alphabet": kept,
        "limit_alphabet": len(kept),
        "show_progress": False,
    }

    # The trainer numbers x and ##x in the order of a hash table, and of equally frequent pairs it
    # merges the one with the lower numbers. Assigning the numbers first makes it reproducible.
    library.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=0, **options))
    first = [*special.values(), *sorted(library.get_vocab())]
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=first, **options)
    library.train_from_iterator(texts, trainer)
    made = json.loads(library.to_str())
    made["added_tokens"] = made["added_tokens"][: len(special)]
    return Tokenizer.from_str(json.dumps(made)), special
