"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors, both ways.

PEFT has lora_A [R, in] and lora_B [out, R] for each linear layer, even where the layer's own weight
is [in, out]. Where queries, keys and values are one linear layer, their adapters become one whose
rank is the sum of theirs: lora_A stacked, lora_B block-diagonal. Its alpha grows with the rank, so
the scale and every logit stay the same. `transformers` holds all experts of a layer in one array,
for which PEFT has no such adapters: adapters of experts are rejected.

Shapes: R rank, I inputs, O outputs of a linear layer, each flattened.
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
from gptjax.hf.safetensors import save_tensors
from gptjax.model import decoder
from gptjax.model.decoder import Params
from gptjax.parallel import sharding
from gptjax.param_tree import leaves_by_path, nested, sides

_LARGEST_ALPHA = 1e6
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
# Settings of adapter_config.json that are read, or that do not change what saved adapters do: which
# modules they are of is in the tensors' names.
_KNOWN = """
peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode r
target_modules exclude_modules lora_alpha lora_dropout fan_in_fan_out bias use_rslora
init_lora_weights layers_to_transform layers_pattern rank_pattern alpha_pattern megatron_config
megatron_core eva_config qalora_group_size runtime_config ensure_weight_tying
"""
# Ways to begin adapters that leave the base as it is. Others, such as PiSSA and OLoRA, change it.
_BASE_UNCHANGED = (True, False, None, "gaussian", "orthogonal", "eva")

Shapes = dict[str, tuple[int, ...]]
Matrices = dict[str, np.ndarray]  # "a" [in..., R] and "b" [R, out...] of one layer's parameter
Stacks = dict[str, dict[int, Matrices]]  # by path, then by row of the path's stack of layers


def _linears(model: ModelConfig, embed: int | None = None) -> Iterator[TensorMapping]:
    """The mappings of the linear layers; with `embed`, of a model of that width."""
    kind, _ = families.family_of(model)
    if embed is not None:
        model = replace(model, embed=embed, head_dim=model.head, mlp=model.hidden)
    for mapping in families.FAMILIES[kind].mappings(model):
        if mapping.per_layer and not mapping.paths[0].endswith(("scale", "bias")):
            yield mapping


def _output_mapping(model: ModelConfig, paths: tuple[str, ...], rank: int) -> TensorMapping:
    """The mapping of a linear layer with `rank` inputs, which splits and joins the outputs of a
    lora_B of that rank.
    """
    return next(mapping for mapping in _linears(model, rank) if mapping.paths == paths)


def _param_shapes(model: ModelConfig) -> Shapes:
    """Shapes of one layer's parameters, by their paths within the block."""
    tree = sharding.abstract(lambda: decoder.init(model, jax.random.key(0)))
    block = leaves_by_path(tree["blocks"]["layer_0"])
    return {path: leaf.shape[1:] for path, leaf in block.items()}


def _lora_shapes(
    mapping: TensorMapping, shapes: Shapes, rank: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of lora_A and lora_B of a linear layer."""
    first = shapes[mapping.paths[0]]
    inputs = math.prod(first[d - 1] for d in sides(mapping.paths[0], len(first) + 1)[0])
    outputs = sum(math.prod(shapes[path]) for path in mapping.paths) // inputs
    return (rank, inputs), (outputs, rank)


def _inputs_first(model: ModelConfig) -> bool:
    """Whether the family's weights are [in, out]."""
    mapping = next(mapping for mapping in _linears(model, 1) if "attn/q" in mapping.paths)
    heads = {"attn/q": model.heads, "attn/k": model.kv, "attn/v": model.kv}
    ones = (np.ones((1, heads[path], model.head), np.float32) for path in mapping.paths)
    return mapping.to_tensor(*ones).shape[0] == 1


# --- export ------------------------------------------------------------------------------------


def write_folder(
    folder: Path, adapters: Params, cfg: LoraConfig, model: ModelConfig, base: str = ""
) -> None:
    """Writes adapters for PEFT to load over the exported base, whose folder or name is `base`.

    Raises MismatchError for a model that no family has, and for adapters of experts or routers.
    """
    ranks, tensors = _export(adapters, model)
    suffixes = _module_suffixes(ranks, _modules(model))
    fused = {suffix: ranks[one] for suffix, one in suffixes.items() if ranks[one] != cfg.rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": cfg.rank,
        "lora_alpha": _number(cfg.scale * cfg.rank),
        "rank_pattern": fused,
        "alpha_pattern": {suffix: _number(cfg.scale * rank) for suffix, rank in fused.items()},
        "target_modules": sorted(suffixes),
        "fan_in_fan_out": _inputs_first(model),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    save_tensors(tensors, folder / TENSORS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2))


def _export(adapters: Params, model: ModelConfig) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """The rank of each adapted module, and PEFT's tensors by name.

    Raises MismatchError for adapters of experts or routers.
    """
    leaves, period = leaves_by_path(adapters), len(model.pattern)
    adapted = {path.split("/", 2)[2].rpartition("/")[0] for path in leaves}
    if model.moe.experts and (of_experts := sorted(p for p in adapted if p.startswith("mlp/"))):
        raise MismatchError(
            f"PEFT has no adapters of experts and routers, and there are some of "
            f"{', '.join(of_experts)}"
        )
    shapes = _param_shapes(model)
    ranks: dict[str, int] = {}
    tensors: dict[str, np.ndarray] = {}
    for mapping in _linears(model):
        for i in range(model.layers):
            row, block = divmod(i, period)
            matrices = {}
            for path in mapping.paths:
                name = f"blocks/layer_{block}/{path}"
                if f"{name}/a" in leaves:
                    matrices[path] = {m: np.asarray(leaves[f"{name}/{m}"][row]) for m in "ab"}
            if matrices:
                module = mapping.name.format(i=i).removesuffix(".weight")
                a_RI, b_OR = _fuse(mapping, matrices, model, shapes)
                tensors[f"{_PREFIX}{module}{_A}"] = np.ascontiguousarray(a_RI)
                tensors[f"{_PREFIX}{module}{_B}"] = np.ascontiguousarray(b_OR)
                ranks[module] = len(a_RI)
    return ranks, tensors


def _fuse(
    mapping: TensorMapping, matrices: dict[str, Matrices], model: ModelConfig, shapes: Shapes
) -> tuple[np.ndarray, np.ndarray]:
    """lora_A [R, I] and lora_B [O, R] of a linear layer, from the adapters of its parameters."""
    a_IR = np.concatenate([m["a"].reshape(-1, m["a"].shape[-1]) for m in matrices.values()], 1)
    rank = a_IR.shape[1]
    if len(mapping.paths) == 1:
        (only,) = matrices.values()
        return a_IR.T, only["b"].reshape(rank, -1).T
    parts, first = [], 0
    for path in mapping.paths:
        part = np.zeros((rank, *shapes[path][1:]), np.float32)
        if path in matrices:
            own = matrices[path]["b"]
            part[first : first + len(own)] = own
            first += len(own)
        parts.append(part)
    b = _output_mapping(model, mapping.paths, rank).to_tensor(*parts)
    return a_IR.T, b.T if _inputs_first(model) else b


def _modules(model: ModelConfig) -> set[str]:
    """The names of all modules of the layers that hold a tensor, norms included."""
    kind, _ = families.family_of(model)
    per_layer = [
        mapping
        for mapping in families.FAMILIES[kind].mappings(model)
        if mapping.per_layer and not mapping.per_expert
    ]
    return {name.rpartition(".")[0] for one in per_layer for name in one.tensor_names(model)}


def _module_suffixes(ranks: dict[str, int], modules: set[str]) -> dict[str, str]:
    """The shortest suffixes of names that select the adapted modules and no others, as
    `target_modules` and `rank_pattern` have them; for each an example of its modules.

    All modules of a suffix have the same rank.
    """
    suffixes: dict[str, str] = {}
    for module in sorted(ranks):
        parts = module.split(".")
        for n in range(1, len(parts) + 1):
            suffix = ".".join(parts[-n:])
            selected = {name for name in modules if f".{name}".endswith(f".{suffix}")}
            if {ranks.get(name) for name in selected} == {ranks[module]}:
                suffixes.setdefault(suffix, module)
                break
    return suffixes


def _number(value: float) -> float | int:
    """An int where the value is whole, as PEFT declares alpha."""
    return int(value) if value == int(value) else value


# --- import ------------------------------------------------------------------------------------


def read_folder(folder: Path, model: ModelConfig) -> tuple[Params, LoraConfig]:
    """Adapters on the ambient mesh, and the configuration that gives them the effect they have in
    PEFT.

    All get the largest rank found, padded with zeros; a layer without an adapter gets zeros, which
    no gradient changes. Raises DataError for files that cannot be used, MismatchError for adapters
    of another kind and for tensors that the model does not have.
    """
    config, tensors = _load(folder)
    mappings = list(_linears(model))
    module_mappings = {
        f"{_PREFIX}{mapping.name.format(i=i).removesuffix('.weight')}": (mapping, i)
        for mapping in mappings
        if not mapping.per_expert
        for i in range(model.layers)
    }
    pairs = _pairs(tensors, set(module_mappings), folder)
    # PEFT's scales may differ between modules; ours is the first's, and b takes up the rest.
    first = next(iter(pairs))
    scale = _scale(config, first, len(pairs[first][0]))
    stacks: Stacks = {}
    shapes, misshapen = _param_shapes(model), []
    for module, (a_RI, b_OR) in pairs.items():
        mapping, i = module_mappings[module]
        wanted = _lora_shapes(mapping, shapes, len(a_RI))
        if (a_RI.shape, b_OR.shape) != wanted:
            misshapen.append(f"{module}: {a_RI.shape}, {b_OR.shape}; the model's: {wanted}")
            continue
        a_RI, b_OR = a_RI.astype(np.float32), b_OR.astype(np.float32)
        b_OR = b_OR * np.float32(_scale(config, module, len(a_RI)) / scale)
        row, block = divmod(i, len(model.pattern))
        for path, matrices in _split(mapping, a_RI, b_OR, model, shapes).items():
            stacks.setdefault(f"blocks/layer_{block}/{path}", {})[row] = matrices
    if misshapen:
        raise MismatchError(f"{folder / TENSORS}: is of another model", misshapen)
    for mapping in mappings:
        if len(mapping.paths) > 1:
            for j in range(len(model.pattern)):
                _drop_unused_ranks(stacks, [f"blocks/layer_{j}/{path}" for path in mapping.paths])
    rank = max(m["a"].shape[-1] for rows in stacks.values() for m in rows.values())
    cfg = LoraConfig(rank, scale * rank, targets=tuple(map(re.escape, sorted(stacks))))
    return _to_device(stacks, cfg, model), cfg


def _load(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """adapter_config.json and the tensors. Raises DataError, and MismatchError for a setting that
    is not supported.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / TENSORS)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise DataError(f"{folder}: cannot be read as PEFT's adapters: {error}") from None
    if not isinstance(config, dict):
        raise DataError(f"{folder / CONFIG}: must hold an object, not {config!r}")
    if problems := list(_wrong_numbers(config)):
        raise DataError("\n  ".join([f"{folder / CONFIG}: cannot be used:", *problems]))
    if problems := list(_wrong_tensors(tensors)):
        raise DataError("\n  ".join([f"{folder / TENSORS}: cannot be used:", *problems]))
    unknown = sorted(set(config) - set(_KNOWN.split()))
    unsupported = [f"{key}={config[key]!r}" for key in unknown if config[key]]
    if (begun := config.get("init_lora_weights")) not in _BASE_UNCHANGED:
        unsupported.append(
            f"init_lora_weights={begun!r}: these adapters go with another base than the one named; "
            "save them in PEFT with path_initial_model_for_weight_conversion"
        )
    if (kind := config.get("peft_type")) != "LORA":
        unsupported.append(f"peft_type={kind!r}")
    if config.get("bias", "none") != "none":
        unsupported.append(f"bias={config['bias']!r}")
    if unsupported:
        raise MismatchError(f"{folder / CONFIG}: not supported", unsupported)
    return config, tensors


def _wrong_numbers(config: dict[str, Any]) -> Iterator[str]:
    """Problems of the settings that scale the adapters."""
    pattern = {} if config.get("alpha_pattern") is None else config["alpha_pattern"]
    alphas = {"lora_alpha": config.get("lora_alpha", 8)}
    if isinstance(pattern, dict):
        alphas |= {f"alpha_pattern.{key}": alpha for key, alpha in pattern.items()}
        for key in pattern:
            try:
                re.compile(key)
            except re.error as error:
                yield f"alpha_pattern.{key[:100]}: is no regular expression: {error}"
            if re.search(r"\)[*+{]", key):  # may take for ever to match
                yield f"alpha_pattern.{key[:100]}: a repeated group is not supported"
    else:
        yield f"alpha_pattern={pattern!r}: must be an object"
    for name, alpha in alphas.items():
        number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not number or not abs(alpha) < _LARGEST_ALPHA:
            yield f"{name}={alpha!r:.100}: must be a number below {_LARGEST_ALPHA:g}"
    if not isinstance(config.get("use_rslora", False), bool | None):
        yield f"use_rslora={config['use_rslora']!r}: must be true or false"


def _wrong_tensors(tensors: dict[str, np.ndarray]) -> Iterator[str]:
    """Problems of tensors that are no matrices of finite numbers."""
    for name, tensor in tensors.items():
        if tensor.dtype.kind not in "fV" and str(tensor.dtype) != "bfloat16":
            yield f"{name}: has the dtype {tensor.dtype}; must be floating-point"
        elif not tensor.size:
            yield f"{name}: has the shape {list(tensor.shape)}, and so no numbers"
        elif not np.isfinite(tensor.astype(np.float32)).all():
            yield f"{name}: holds NaN or infinities"


def _pairs(
    tensors: dict[str, np.ndarray], modules: set[str], folder: Path
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """lora_A and lora_B by module. Raises MismatchError unless all tensors are such pairs."""
    named = sorted({name.removesuffix(end) for name in tensors for end in (_A, _B)} & modules)
    complete = [m for m in named if f"{m}{_A}" in tensors and f"{m}{_B}" in tensors]
    unexpected = sorted(set(tensors) - {f"{m}{end}" for m in complete for end in (_A, _B)})
    if unexpected or not complete:
        raise MismatchError(
            f"{folder / TENSORS}: tensors that are no pairs of the model's modules", unexpected
        )
    return {m: (tensors[f"{m}{_A}"], tensors[f"{m}{_B}"]) for m in complete}


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """The number by which PEFT multiplies a module's product: alpha/rank, or with rsLoRA
    alpha/sqrt(rank).
    """
    name = module.removeprefix(_PREFIX)
    of_module = [
        alpha
        for key, alpha in (config.get("alpha_pattern") or {}).items()
        if re.match(rf"(.*\.)?({key})$", name)
    ]
    alpha = (of_module or [config.get("lora_alpha", 8)])[0]
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _split(
    mapping: TensorMapping, a_RI: np.ndarray, b_OR: np.ndarray, model: ModelConfig, shapes: Shapes
) -> dict[str, Matrices]:
    """The adapter of each parameter in a linear layer: the inverse of `_fuse`, at full rank."""
    rank = len(a_RI)
    if len(mapping.paths) == 1:
        (path,) = mapping.paths
        count = len(sides(path, len(shapes[path]) + 1)[0])
        ins, outs = shapes[path][:count], shapes[path][count:]
        return {path: {"a": a_RI.T.reshape(*ins, rank), "b": b_OR.T.reshape(rank, *outs)}}
    outputs = _output_mapping(model, mapping.paths, rank)
    parts = outputs.to_params(b_OR.T if _inputs_first(model) else b_OR)
    return {
        path: {"a": a_RI.T, "b": np.ascontiguousarray(part)}
        for path, part in zip(mapping.paths, parts, strict=True)
    }


def _drop_unused_ranks(stacks: Stacks, fused: list[str]) -> None:
    """Drops from the adapter of each parameter of a fused layer the ranks that only others use.

    Adapters that `write_folder` fused so become again what they were. Where all b are zero, as when
    fresh, nothing shows which ranks are used, and all are kept.
    """
    present = [path for path in fused if path in stacks]
    if len({len(m["b"]) for path in present for m in stacks[path].values()}) != 1:
        return
    used = {
        path: np.any([(m["b"] != 0).any((1, 2)) for m in stacks[path].values()], axis=0)
        for path in present
    }
    if not np.any(list(used.values())):
        return
    for path, keep in used.items():
        rows = stacks.pop(path)
        if keep.any():
            stacks[path] = {
                row: {"a": m["a"][..., keep], "b": m["b"][keep]} for row, m in rows.items()
            }


def _to_device(stacks: Stacks, cfg: LoraConfig, model: ModelConfig) -> Params:
    """The adapters as arrays on the ambient mesh, zero where there are none."""

    def make(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        target, _, matrix = path.rpartition("/")
        whole = np.zeros(leaf.shape, np.float32)
        for row, matrices in stacks[target].items():
            value = matrices[matrix]
            at = np.s_[row, ..., : value.shape[-1]] if matrix == "a" else np.s_[row, : len(value)]
            whole[at] = value
        return jax.device_put(whole, leaf.sharding)

    key = jax.random.key(0)
    abstract = sharding.abstract(lambda: lora.init(decoder.init(model, key), cfg, key))
    return nested({path: make(path, leaf) for path, leaf in leaves_by_path(abstract).items()})
