"""Tokens that are declared beside tokenizer.json, with the ids that `transformers` 5 gives them.

First come those that tokenizer_config.json (added_tokens_decoder) and added_tokens.json declare
with an id, then special tokens that are declared by their role alone, each at the end of the
vocabulary unless it is there already.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from gptjax.errors import DataError

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # in the order of transformers
_NEVER_DRAWN = ("sep", "pad", "cls", "mask")


class AddedToken(NamedTuple):
    """A token that was added to the vocabulary."""

    id: int
    content: str
    special: bool
    needed: bool
    """Whether a model has a row for it; for one that is declared only for padding, it may not."""


def add_declared(
    library: Any,
    config: Mapping[str, Any],
    by_id: Mapping[str, Any],
    declared: Mapping[str, str],
) -> list[AddedToken]:
    """Adds the declared tokens that a `tokenizers.Tokenizer` lacks, and makes special ones special.

    `config` is tokenizer_config.json, `by_id` added_tokens.json; `declared` has special tokens by
    role, such as eos_token. Returns those that were added. Raises DataError.
    """
    from tokenizers import AddedToken as Token

    added = []
    for token, wanted in _with_ids(config, by_id):
        if library.token_to_id(token.content) is None:
            (library.add_special_tokens if token.special else library.add_tokens)([token])
            number = library.token_to_id(token.content)
            if number != wanted:
                raise DataError(
                    f"{token.content!r} is declared with the id {wanted} beside tokenizer.json, "
                    f"where it would be {number}; add it to tokenizer.json"
                )
            added.append(AddedToken(number, token.content, token.special, True))
    known = {token.content: token for token in library.get_added_tokens_decoder().values()}
    roles = [f"{role}_token" for role in _ROLES]
    for role in sorted(declared, key=lambda r: roles.index(r) if r in roles else len(roles)):
        token = known.get(declared[role], Token(declared[role], normalized=False))
        absent = library.token_to_id(token.content) is None
        if absent or not token.special:
            token.special = True
            library.add_special_tokens([token])
        if absent:
            needed = role.removesuffix("_token") not in _NEVER_DRAWN
            number = library.token_to_id(token.content)
            added.append(AddedToken(number, token.content, True, needed))
    return added


def _with_ids(config: Mapping[str, Any], by_id: Mapping[str, Any]) -> list[tuple[Any, int]]:
    """The tokens that are declared with an id, and the ids, by id."""
    from tokenizers import AddedToken as Token

    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    found: dict[str, tuple[Any, int]] = {}
    try:
        for number, token in (config.get("added_tokens_decoder") or {}).items():
            given = {flag: bool(token[flag]) for flag in flags if flag in token}
            found[token["content"]] = Token(token["content"], **given), int(number)
        for content, number in by_id.items():
            found.setdefault(content, (Token(content), int(number)))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"the tokens beside tokenizer.json cannot be read: {error!r}") from None
    return sorted(found.values(), key=lambda one: one[1])
