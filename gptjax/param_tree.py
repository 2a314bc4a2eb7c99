"""Trees of parameters by path, and selection of parameters by pattern.

A pattern is a regular expression that matches the whole path (`re.fullmatch`), like PEFT's
`target_modules`: "blocks/.*/attn/(q|v)". Arrays of the blocks have a leading axis of layers.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from gptjax.errors import ConfigError

Leaves = dict[str, Any]  # by path, "blocks/layer_0/attn/q"
Tree = dict[str, Any]


def leaves_by_path(tree: Any) -> Leaves:
    """Leaves of a tree by slash-joined path."""
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}


def nested(leaves: Leaves) -> Tree:
    """The inverse of `leaves_by_path`, as plain nested dicts."""
    tree: Tree = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        functools.reduce(lambda node, part: node.setdefault(part, {}), parents, tree)[name] = leaf
    return tree


def matching(paths: Iterable[str], patterns: Sequence[str], option: str) -> set[str]:
    """The paths that match any of the patterns.

    Raises ConfigError, which names the option and lists all paths, for patterns that match none.
    """
    known, found, problems = sorted(paths), set(), []
    for pattern in patterns:
        matched = {path for path in known if re.fullmatch(pattern, path)}
        if not matched:
            problems.append(f"{option}={pattern}: matches none of {', '.join(known)}")
        found |= matched
    if problems:
        raise ConfigError(problems)
    return found


def sides(path: str, ndim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The numbers of the input dimensions and of the output dimensions of a block's matrix.

    Leading dimensions, which stack matrices, are in neither. Shapes are [layers, in, out], [layers,
    embed, heads, head_dim], [layers, heads, head_dim, embed], and for experts [layers, experts, in,
    out]. An adapter's "a" is [layers, in..., rank], its "b" [layers, rank, out...].
    """
    parts = path.split("/")
    experts = "mlp" in parts and ndim == 4
    axes = tuple(range(2 if experts else 1, ndim))
    inputs = axes[:-1] if parts[-1] in ("o", "a") else axes[:1]
    return inputs, axes[len(inputs) :]
