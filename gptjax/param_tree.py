"""Parameters by their paths, and which of them a pattern means.

A pattern is a regular expression that the whole path matches (`re.fullmatch`), as PEFT's
`target_modules` has it: "blocks/.*/attn/(q|v)". Arrays of the blocks have a leading axis of layers.
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
    """Nested dicts of the paths' parts: what goes to disk, free of any library's containers."""
    tree: Tree = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        functools.reduce(lambda node, part: node.setdefault(part, {}), parents, tree)[name] = leaf
    return tree


def matching(paths: Iterable[str], patterns: Sequence[str], option: str) -> set[str]:
    """The paths that some pattern matches as a whole.

    Raises ConfigError, with all paths, for a pattern of the option that matches none.
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
    """Dimensions of inputs and of outputs of a matrix of the blocks; those before stack matrices.

    [layers, in, out], [layers, embed, heads, head_dim], [layers, heads, head_dim, embed], and of
    experts [layers, experts, in, out]. Of an adapter's "a" all but the rank are inputs, of its "b"
    all but the rank outputs.
    """
    parts = path.split("/")
    experts = "mlp" in parts and ndim == 4
    axes = tuple(range(2 if experts else 1, ndim))
    inputs = axes[:-1] if parts[-1] in ("o", "a") else axes[:1]
    return inputs, axes[len(inputs) :]
