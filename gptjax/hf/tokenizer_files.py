"""A run's tokenizer in a Hugging Face folder: its files, and their comparison with the tokenizer.

The comparison is over hostile texts and every token, in both directions, with the tokenizer that
`transformers` makes of the folder where it is installed, or else `tokenizers`.
"""

import importlib.util
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.hf.reader import Json
from gptjax.tokenizer import FILES, HuggingFaceTokenizer, Tokenizer
from gptjax.tokenizer.interface import valid_text
from gptjax.tokenizer.to_huggingface import tokenizer_json

_TEXTS = 2000
_SPACE_BYTE = "<0x20>"  # a space has a piece of its own; alone, this byte is shown as one or not
_BLOCK = 1024  # texts or tokens that are compared at once
_FRAGMENTS = (
    *("\n", "\t", "\r\n", "\0", "\u00a0", "\u2581", "\u200d", "\ufeff", "e\u0301", "ﬁ", "İ", "ß"),
    *("<0x41>", "<0x0A>", "Ġ", "##a", "don't", "1234567", "日本語", "ไทย", "🙂", "👩‍👩‍👧", "שלום"),
    *("def f(x):\n    return x\n", "http://a.b/c?d=e", "   Hello, world!  ", "naïve café"),
)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, context: int) -> None:
    """Writes tokenizer.json and the files that `transformers` reads beside it.

    `context` is the greatest number of tokens of a text for the model.
    """
    files: dict[str, bytes] = {}
    start: int | None = tokenizer.prefix_id
    if isinstance(tokenizer, HuggingFaceTokenizer):
        files = tokenizer.files()
        if tokenizer.start_id is None:
            start = tokenizer.bos_id
    config = json.loads(files.pop("tokenizer_config.json", b"{}"))
    roles = {"bos": start, "eos": tokenizer.eos_id, "unk": tokenizer.unk_id}
    own = {f"{role}_token": tokenizer.piece(i) for role, i in roles.items() if i is not None}
    config |= own | {
        "tokenizer_class": "PreTrainedTokenizerFast",  # tokenizer.json as it stands
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    special = json.loads(files.pop("special_tokens_map.json", b"{}")) | own
    files.pop("generation_config.json", None)
    files.pop("token_ids.json", None)  # which config.json says
    files |= {
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
        "special_tokens_map.json": json.dumps(special, indent=2).encode(),
        FILES["huggingface"]: tokenizer_json(tokenizer),
    }
    for name, contents in files.items():
        (folder / name).write_bytes(contents)


def generation_config(tokenizer: Tokenizer) -> Json:
    """The contents of generation_config.json: what begins a text, and what ends it."""
    stop = list(tokenizer.stop_ids)
    return {
        "bos_token_id": tokenizer.prefix_id,
        "eos_token_id": stop if len(stop) > 1 else stop[0],
        "pad_token_id": tokenizer.eos_id,
    }


class _Other(NamedTuple):
    """A folder's tokenizer as another library loads it."""

    library: str
    encode: Callable[[list[str]], list[list[int]]]
    """Ids of texts, with nothing added."""
    prompt: Callable[[list[str]], list[list[int]]]
    """Ids of texts, with what is added to them."""
    decode: Callable[[list[list[int]]], list[str]]
    """Texts of ids without special tokens."""


def compare_tokenizer(folder: Path, tokenizer: Tokenizer) -> Json | str:
    """Compares the tokenizer of a folder with a run's, over hostile texts and every token.

    The result has the number of "texts" and "tokens" that were compared, the number that "differ"
    and, of the first one of each kind, what both give. Returns why it was not compared where
    `transformers` cannot load the folder's.
    """
    try:
        other = _other(folder)
    except Exception as error:  # of any kind: the folder of an imported model may hold anything
        return f"not compared: {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    texts = [*hostile_texts(tokenizer)]
    tokens = [
        [i]
        for i in range(tokenizer.vocab_size)
        if i != tokenizer.unk_id and tokenizer.piece(i) != _SPACE_BYTE
    ]
    texts += [text for ids in tokens if (text := tokenizer.decode(ids))]
    encode = tokenizer.markup if isinstance(tokenizer, HuggingFaceTokenizer) else tokenizer.encode
    ids = list(map(encode, texts))
    known = [one for one in ids if tokenizer.unk_id not in one]
    checks: list[tuple[str, list[Any], Callable[..., Any], Callable[..., Any]]] = [
        ("ids", texts, encode, other.encode),
        ("ids of a prompt", texts, tokenizer.prompt, other.prompt),
        ("text", known + tokens, tokenizer.decode, other.decode),
    ]
    result: Json = {"with": other.library, "texts": len(texts), "tokens": len(tokens), "differ": 0}
    for what, given, ours, theirs in checks:
        for start in range(0, len(given), _BLOCK):
            block = given[start : start + _BLOCK]
            for value, got in zip(block, theirs(block), strict=True):
                own = ours(value)
                if what == "ids of a prompt":  # without what is added behind, such as EOS
                    got = got[: len(own)]
                if own != got:
                    result["differ"] += 1
                    result.setdefault(what, {"of": value, "run": own, "folder": got})
    return result


def _other(folder: Path) -> _Other:
    if importlib.util.find_spec("transformers") is None:
        import tokenizers

        library = tokenizers.Tokenizer.from_file(str(folder / FILES["huggingface"]))
        return _Other(
            f"tokenizers {tokenizers.__version__}",
            lambda texts: [
                one.ids for one in library.encode_batch(texts, add_special_tokens=False)
            ],
            lambda texts: [one.ids for one in library.encode_batch(texts)],
            library.decode_batch,
        )
    import transformers

    transformers.utils.logging.set_verbosity_error()
    auto = transformers.AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    return _Other(
        f"transformers {transformers.__version__}",
        lambda texts: auto(texts, add_special_tokens=False).input_ids,
        lambda texts: auto(texts).input_ids,
        lambda ids: auto.batch_decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ),
    )


def hostile_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Texts in which tokenizers differ: spaces in rows, rare characters, spelled-out tokens."""
    draw = random.Random(0)
    pieces = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]

    def rare() -> str:
        return chr(draw.choice((draw.randrange(1, 0xD800), draw.randrange(0xE000, 0x110000))))

    fragments = (
        rare,
        lambda: chr(draw.randrange(0x20, 0x7F)),
        lambda: " " * draw.randint(1, 12),
        lambda: draw.choice(_FRAGMENTS),
        lambda: draw.choice(pieces) * draw.randint(1, 5),
    )
    plain = [i for i, text in enumerate(pieces) if not text or i == tokenizer.unk_id]
    special = [] if _parses_special(tokenizer) else list(map(tokenizer.piece, plain))
    for _ in range(_TEXTS):
        text = "".join(draw.choice(fragments)() for _ in range(draw.randint(1, 40)))
        if not any(token and token in text for token in special):
            yield valid_text(text)


def _parses_special(tokenizer: Tokenizer) -> bool:
    """Whether special tokens that are spelled out in a prompt become tokens."""
    return isinstance(tokenizer, HuggingFaceTokenizer)
