"""The tokenizer of a Hugging Face folder: tokenizer.json, tokenizer.model, or GPT-2's files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from gptjax import tokenizer as tokenizers
from gptjax.config import TokenizerConfig
from gptjax.errors import DataError
from gptjax.hf.safetensors import Source
from gptjax.tokenizer import bpe_files

_TOKENIZER_FILES: dict[Literal["huggingface", "sentencepiece"], str] = {
    "huggingface": "tokenizer.json",
    "sentencepiece": "tokenizer.model",
}


def _declared_elsewhere(folder: Path, tokenizer: tokenizers.Tokenizer) -> list[str]:
    """Tokens that JSON files beside tokenizer.model declare, and that it does not have so."""
    if tokenizer.kind != "sentencepiece":
        return []
    pieces = {tokenizer.piece(i): i for i in range(tokenizer.vocab_size)}
    declared: dict[str, int | None] = {}
    file = folder / "tokenizer_config.json"
    try:
        if file.exists():
            config = json.loads(file.read_text())
            for number, token in (config.get("added_tokens_decoder") or {}).items():
                declared[token["content"]] = int(number)
            if eos := config.get("eos_token"):
                declared[eos if isinstance(eos, str) else eos["content"]] = tokenizer.eos_id
        file = folder / "added_tokens.json"
        if file.exists():
            declared |= json.loads(file.read_text())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{file}: cannot be read: {error!r}") from None
    return [repr(content) for content, number in declared.items() if pieces.get(content) != number]


def tokenizer_of(source: Source, say: Callable[[str], None]) -> tokenizers.Tokenizer | None:
    """The folder's tokenizer; None if it has none that can be used, and `say` is told why."""
    folder = source.folder
    files = dict(_TOKENIZER_FILES)
    why = f"no {' and no '.join(files.values())}"
    if not (folder / files["huggingface"]).exists() and (other := bpe_files.find(folder)):
        files = {"huggingface": other.name}
    for kind, file in files.items():
        if (folder / file).exists():
            try:
                tokenizer = tokenizers.make(TokenizerConfig(kind, str(folder / file)), ())
            except DataError as error:
                why = str(error)
                continue
            if unknown := _declared_elsewhere(folder, tokenizer):
                why = (
                    f"{file} lacks {', '.join(unknown[:5])}, which other files declare; make a "
                    "tokenizer.json of them: python -c 'from transformers import AutoTokenizer as "
                    f'T; T.from_pretrained("{folder}").save_pretrained("{folder}")\''
                )
                continue
            if tokenizer.vocab_size <= source.model.vocab_size:
                for note in tokenizer.notes:
                    say(f"{folder}/{note}")
                return tokenizer
            why = f"{file} has {tokenizer.vocab_size} tokens, the model {source.model.vocab_size}"
    say(f"{folder}: {why}; so the run cannot read text")
    return None
