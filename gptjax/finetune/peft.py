"""Adapters as PEFT has them: adapter_config.json and adapter_model.safetensors, both ways.

A linear layer of theirs has lora_A [R, in] and lora_B [out, R], also where its own weight is
[in, out]. Where queries, keys and values are one layer, the adapters of ours stand side by side in
one of the sum of their ranks, each in its own block of lora_B; alpha grows with the rank, so the
scale, and every logit, is the same. Of experts, which `transformers` holds in one array, PEFT has
no adapters of this kind: they are refused.

Shapes: D embed, H heads, C head_dim, R rank, L layers.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax.config import LoraConfig, ModelConfig
from gptjax.errors import DataError, MismatchError
from gptjax.finetune import lora
from gptjax.hf import families
from gptjax.hf.mapping import TensorMapping
from gptjax.model import decoder
from gptjax.model.decoder import Params
from gptjax.parallel import sharding
from gptjax.param_tree import leaves_by_path, nested, sides

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What an adapter may have beside its two matrices, and ours have not.
_UNKNOWN = """
use_dora modules_to_save lora_bias target_parameters trainable_token_indices layer_replication
use_qalora alora_invocation_tokens use_bdlora
"""

Shapes = dict[str, tuple[int, ...]]
Halves = dict[str, np.ndarray]  # "a" [in..., R] and "b" [R, out...] of one layer


def _linears(model: ModelConfig, rank: int | None = None) -> Iterator[TensorMapping]:
    """Their linear layers; with `rank`, as if the residual stream were of that width."""
    kind, _ = families.family_of(model)
    of = model
    if rank is not None:
        of = replace(model, embed=rank, head_dim=model.head, mlp=model.hidden)
    for piece in families.FAMILIES[kind].pieces(of):
        if piece.in_layer and not piece.paths[0].endswith(("scale", "bias")):
            yield piece


def _joins(model: ModelConfig, rank: int) -> dict[tuple[str, ...], TensorMapping]:
    """What cuts and joins the outputs of an adapter of this rank, by the parameters it is for."""
    return {piece.paths: piece for piece in _linears(model, rank)}


def _shapes(model: ModelConfig) -> Shapes:
    """Shapes of one layer's parameters, by their paths in it."""
    tree = sharding.abstract(lambda: decoder.init(model, jax.random.key(0)))
    inner = leaves_by_path(tree["blocks"]["layer_0"])
    return {path: leaf.shape[1:] for path, leaf in inner.items()}


def _sizes(
    piece: TensorMapping, shapes: Shapes, rank: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of their lora_A and lora_B of a layer."""
    first = shapes[piece.paths[0]]
    inputs = math.prod(first[d - 1] for d in sides(piece.paths[0], len(first) + 1)[0])
    outputs = sum(math.prod(shapes[path]) for path in piece.paths) // inputs
    return (rank, inputs), (outputs, rank)


def _inputs_first(model: ModelConfig) -> bool:
    """Whether their weights are [in, out]."""
    piece = next(piece for piece in _linears(model, 1) if "attn/q" in piece.paths)
    heads = {"attn/q": model.heads, "attn/k": model.kv, "attn/v": model.kv}
    ones = (np.ones((1, heads[path], model.head), np.float32) for path in piece.paths)
    return piece.join(*ones).shape[0] == 1


# --- export ------------------------------------------------------------------------------------


def write_folder(
    folder: Path, adapters: Params, cfg: LoraConfig, model: ModelConfig, base: str = ""
) -> None:
    """Writes adapters for PEFT to load over the exported base, whose folder or name is `base`.

    Raises MismatchError for a model that no family has, and for adapters of experts or routers.
    """
    from safetensors.numpy import save_file

    leaves, period = leaves_by_path(adapters), len(model.pattern)
    ranks, tensors, shapes = {}, {}, _shapes(model)
    adapted = {path.split("/", 2)[2].rpartition("/")[0] for path in leaves}
    if mixed := sorted(path for path in adapted if model.moe.experts and path.startswith("mlp/")):
        raise MismatchError(
            f"PEFT has no adapters of experts and routers, and there are some of {', '.join(mixed)}"
        )
    for piece in _linears(model):
        for i in range(model.layers):
            row, block = divmod(i, period)
            halves = {}
            for path in piece.paths:
                name = f"blocks/layer_{block}/{path}"
                if f"{name}/a" in leaves:
                    halves[path] = {h: np.asarray(leaves[f"{name}/{h}"][row]) for h in "ab"}
            if halves:
                module = piece.name.format(i=i).removesuffix(".weight")
                a_RI, b_OR = _fused(piece, halves, model, shapes)
                tensors[f"{_PREFIX}{module}.lora_A.weight"] = a_RI
                tensors[f"{_PREFIX}{module}.lora_B.weight"] = b_OR
                ranks[module] = len(a_RI)
    suffixes = _suffixes(ranks, _modules(model))
    wider = {suffix: ranks[one] for suffix, one in suffixes.items() if ranks[one] != cfg.rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": cfg.rank,
        "lora_alpha": _plain(cfg.scale * cfg.rank),
        "rank_pattern": wider,
        "alpha_pattern": {suffix: _plain(cfg.scale * rank) for suffix, rank in wider.items()},
        "target_modules": sorted(suffixes),
        "fan_in_fan_out": _inputs_first(model),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors, folder / TENSORS, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2))


def _fused(
    piece: TensorMapping, halves: dict[str, Halves], model: ModelConfig, shapes: Shapes
) -> tuple[np.ndarray, np.ndarray]:
    """lora_A [R, in] and lora_B [out, R] of one layer from those of the parameters in it."""
    flat = {path: h["a"].reshape(-1, h["a"].shape[-1]) for path, h in halves.items()}
    a_IR = np.concatenate(list(flat.values()), 1)
    rank = a_IR.shape[1]
    if len(piece.paths) == 1:
        (half,) = halves.values()
        return a_IR.T, half["b"].reshape(rank, -1).T
    parts, first = [], 0
    for path in piece.paths:
        part = np.zeros((rank, *shapes[path][1:]), np.float32)
        if path in halves:
            own = halves[path]["b"]
            part[first : first + len(own)] = own
            first += len(own)
        parts.append(part)
    b = _joins(model, rank)[piece.paths].join(*parts)
    return a_IR.T, b.T if _inputs_first(model) else b


def _modules(model: ModelConfig) -> set[str]:
    """All of their modules in layers, norms as well."""
    kind, _ = families.family_of(model)
    names = (
        p.name for p in families.FAMILIES[kind].pieces(model) if p.in_layer and "{e}" not in p.name
    )
    return {name.format(i=i).rpartition(".")[0] for name in names for i in range(model.layers)}


def _suffixes(ranks: dict[str, int], known: set[str]) -> dict[str, str]:
    """The shortest ends of names that mean none but modules with a rank, all of one; an example of
    each end's."""
    found: dict[str, str] = {}
    for module in sorted(ranks):
        parts = module.split(".")
        for n in range(1, len(parts) + 1):
            suffix = ".".join(parts[-n:])
            alike = {name for name in known if f".{name}".endswith(f".{suffix}")}
            if {ranks.get(name) for name in alike} == {ranks[module]}:
                found.setdefault(suffix, module)
                break
    return found


def _plain(value: float) -> float | int:
    """An integer where it is one, as their field is declared."""
    return int(value) if value == int(value) else value


# --- import ------------------------------------------------------------------------------------


def read_folder(folder: Path, model: ModelConfig) -> tuple[Params, LoraConfig]:
    """Adapters on the ambient mesh, and the configuration that makes them what they are to PEFT.

    All get the largest rank there is, filled up with zeros; a layer without an adapter gets zeros,
    which no gradient moves. Raises DataError for files that cannot be used, MismatchError for
    adapters of another kind, and for tensors that have no place in the model.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / TENSORS)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{folder}: cannot be read as PEFT's adapters: {error}") from None
    strange = [f"{key}={config[key]!r}" for key in _UNKNOWN.split() if config.get(key)]
    if (kind := config.get("peft_type")) != "LORA":
        strange.append(f"peft_type={kind!r}")
    if config.get("bias", "none") != "none":
        strange.append(f"bias={config['bias']!r}")
    if strange:
        raise MismatchError(f"{folder / CONFIG}: no counterpart here", strange)

    place = {
        f"{_PREFIX}{piece.name.format(i=i).removesuffix('.weight')}": (piece, i)
        for piece in _linears(model)
        if "{e}" not in piece.name
        for i in range(model.layers)
    }
    pairs = _pairs(tensors, set(place), folder)
    # Theirs may differ from one to another; ours is that of the first, the rest goes into b.
    first = next(iter(pairs))
    scale = _scale(config, first, len(pairs[first][0]))
    layers: dict[str, dict[int, Halves]] = {}
    shapes, misshapen = _shapes(model), []
    for module, (a_RI, b_OR) in pairs.items():
        piece, i = place[module]
        wanted = _sizes(piece, shapes, len(a_RI))
        if (a_RI.shape, b_OR.shape) != wanted:
            misshapen.append(f"{module}: {a_RI.shape}, {b_OR.shape}; the model's: {wanted}")
            continue
        b_OR = np.float32(b_OR) * np.float32(_scale(config, module, len(a_RI)) / scale)
        for path, halves in _apart(piece, np.float32(a_RI), b_OR, model, shapes).items():
            row, block = divmod(i, len(model.pattern))
            layers.setdefault(f"blocks/layer_{block}/{path}", {})[row] = halves
    if misshapen:
        raise MismatchError(f"{folder / TENSORS}: is of another model", misshapen)
    for piece in _linears(model):
        if len(piece.paths) > 1:
            for j in range(len(model.pattern)):
                _drop_unused(layers, [f"blocks/layer_{j}/{path}" for path in piece.paths])
    rank = max(h["a"].shape[-1] for rows in layers.values() for h in rows.values())
    cfg = LoraConfig(rank, scale * rank, targets=tuple(map(re.escape, sorted(layers))))

    def make(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        target, _, half = path.rpartition("/")
        whole = np.zeros(leaf.shape, np.float32)
        for row, halves in layers[target].items():
            value = halves[half]
            at = np.s_[row, ..., : value.shape[-1]] if half == "a" else np.s_[row, : len(value)]
            whole[at] = value
        return jax.device_put(whole, leaf.sharding)

    key = jax.random.key(0)
    abstract = sharding.abstract(lambda: lora.init(decoder.init(model, key), cfg, key))
    return nested({path: make(path, x) for path, x in leaves_by_path(abstract).items()}), cfg


def _pairs(
    tensors: dict[str, np.ndarray], known: set[str], folder: Path
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """lora_A and lora_B by module. Raises MismatchError unless all tensors are such pairs."""
    halves = (".lora_A.weight", ".lora_B.weight")
    modules = sorted({name.removesuffix(end) for name in tensors for end in halves} & known)
    whole = [m for m in modules if all(f"{m}{end}" in tensors for end in halves)]
    left = sorted(set(tensors) - {f"{module}{end}" for module in whole for end in halves})
    if left or not whole:
        raise MismatchError(f"{folder / TENSORS}: tensors with no place in the model", left)
    return {m: (tensors[f"{m}{halves[0]}"], tensors[f"{m}{halves[1]}"]) for m in whole}


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies a module's product with."""
    name = module.removeprefix(_PREFIX)
    of_module = [
        alpha
        for key, alpha in (config.get("alpha_pattern") or {}).items()
        if re.match(rf"(.*\.)?({key})$", name)
    ]
    alpha = (of_module or [config.get("lora_alpha", 8)])[0]
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _apart(
    piece: TensorMapping, a_RI: np.ndarray, b_OR: np.ndarray, model: ModelConfig, shapes: Shapes
) -> dict[str, Halves]:
    """The halves of each parameter in one of their layers."""
    rank = len(a_RI)
    if len(piece.paths) == 1:
        (path,) = piece.paths
        count = len(sides(path, len(shapes[path]) + 1)[0])
        ins, outs = shapes[path][:count], shapes[path][count:]
        return {path: {"a": a_RI.T.reshape(*ins, rank), "b": b_OR.T.reshape(rank, *outs)}}
    parts = _joins(model, rank)[piece.paths].split(b_OR.T if _inputs_first(model) else b_OR)
    return {
        path: {"a": a_RI.T, "b": np.ascontiguousarray(part)}
        for path, part in zip(piece.paths, parts, strict=True)
    }


def _drop_unused(layers: dict[str, dict[int, Halves]], fused: list[str]) -> None:
    """Takes from each of the parameters of one of their layers the ranks that only others use.

    So what `write_folder` has put side by side comes back as it was. Of adapters that are all zero,
    as fresh ones are, nothing is known, and every one keeps all.
    """
    there = [path for path in fused if path in layers]
    if len({len(h["b"]) for path in there for h in layers[path].values()}) != 1:
        return
    used = {
        path: np.any([(h["b"] != 0).any((1, 2)) for h in layers[path].values()], axis=0)
        for path in there
    }
    if not np.any(list(used.values())):
        return
    for path, keep in used.items():
        rows = layers.pop(path)
        if keep.any():
            layers[path] = {
                row: {"a": h["a"][..., keep], "b": h["b"][keep]} for row, h in rows.items()
            }
