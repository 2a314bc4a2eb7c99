"""The tensors of Hugging Face folders: every one accounted for, read one at a time.

Each device's share of a parameter is filled layer by layer and brought to it before the next, so
host memory holds one share and two tensors beyond what is on the devices. Files are written of up
to 4 GB, which are held whole. Pickled checkpoints are refused: loading one runs code from it. What
a tensor holds is declared in families.py.
"""

import contextlib
import functools
import itertools
import json
import math
import mmap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from gptjax import tokenizer as tokenizers
from gptjax.checkpoint.checkpointer import leaves_by_path
from gptjax.config import ModelConfig, TokenizerConfig
from gptjax.errors import DataError, MismatchError
from gptjax.hf import families
from gptjax.hf.mapping import TensorMapping
from gptjax.hf.reader import Family, Json
from gptjax.model import decoder
from gptjax.model.decoder import Params
from gptjax.parallel import mesh, sharding
from gptjax.sample import decoding

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SHARD_BYTES = 4_000_000_000
_FORMATS: dict[str, Any] = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
FORMATS_BY_NAME = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_ALIGNED = 64  # bytes
_READERS = 2
_PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "consolidated*.pth")


# --- files -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A Hugging Face folder: its configuration, its family, the model, and the tensors' files."""

    folder: Path
    config: Json
    family: Family
    model: ModelConfig
    unread: tuple[str, ...]
    files: Mapping[str, Any] = field(repr=False)
    names: Mapping[str, str] = field(repr=False)

    def tensor(self, name: str) -> np.ndarray:
        """A tensor by its full name, in the dtype of the file."""
        stored = self.names[name]
        return self.files[stored].get_tensor(stored)

    def dtype(self, name: str) -> str:
        """Its number format: F32, BF16, F16."""
        return str(self.files[self.names[name]].get_slice(self.names[name]).get_dtype())


def open_source(folder: Path, beside: Collection[str] = ()) -> Source:
    """Opens a folder and accounts for every tensor of it; reads none. `beside` the model's tensors
    those of these names are there too.

    Raises DataError for a folder or file that cannot be used, MismatchError for a model that has no
    counterpart here, and for tensors that are missing, left over or of another shape.
    """
    config_file = folder / "config.json"
    if not config_file.exists():
        raise DataError(f"{folder}: no config.json; give a folder of a Hugging Face model")
    try:
        config = json.loads(config_file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{config_file}: cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise DataError(f"{config_file}: must hold an object")
    family, model, unread = families.read_config(config, str(config_file))
    pieces = family.pieces(model)
    files = _open_files(folder)
    return Source(
        folder,
        config,
        family,
        model,
        tuple(sorted(unread - set(_NO_MATHEMATICS.split()))),
        files,
        _account(folder, family, model, pieces, {k: v for k, v in files.items() if k not in beside})
        | {name: name for name in beside},
    )


# Keys of config.json that change no logits, and keys that a family may do without.
_NO_MATHEMATICS = """
architectures model_type torch_dtype dtype transformers_version use_cache bos_token_id eos_token_id
pad_token_id initializer_range pretraining_tp attention_dropout hidden_dropout attn_pdrop embd_pdrop
resid_pdrop output_router_logits router_jitter_noise task_specific_params _name_or_path n_ctx
summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
reorder_and_upcast_attn auto_map use_sliding_window sliding_window
multi_query num_kv_heads num_ln_in_parallel_attn parallel_attn rope_theta rope_scaling
rope_parameters
"""


def _open_files(folder: Path) -> dict[str, Any]:
    """The open safetensors file of each tensor, by the name that it has there."""
    from safetensors import SafetensorError, safe_open

    names: Iterable[str] | None = None
    if (folder / _INDEX).exists():
        try:
            files = json.loads((folder / _INDEX).read_text())["weight_map"]
            wanted = sorted(set(files.values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise DataError(f"{folder / _INDEX}: cannot be read ({error!r})") from None
        if bad := [name for name in wanted if Path(name).name != name]:
            raise DataError(f"{folder / _INDEX}: names a file outside its folder: {bad[0]}")
        names = files
    elif (folder / _SINGLE).exists():
        wanted = [_SINGLE]
    elif any(next(folder.glob(pattern), None) for pattern in _PICKLED):
        raise DataError(
            f"{folder}: holds pickled weights only, and loading a pickle runs code from it. In an "
            'environment that you can throw away: python -c "from transformers import '
            f"AutoModelForCausalLM as M; M.from_pretrained('{folder}').save_pretrained('SAFE')\""
        )
    else:
        raise DataError(f"{folder}: no {_SINGLE} and no {_INDEX}")
    opened: dict[str, Any] = {}
    for name in wanted:
        try:
            handle = safe_open(folder / name, "np")
        except (SafetensorError, OSError) as error:
            raise DataError(f"{folder / name}: cannot be read as safetensors: {error}") from None
        opened |= dict.fromkeys(handle.keys(), handle)
    if names is not None and (missing := set(names) - set(opened)):
        raise DataError(f"{folder / _INDEX}: {min(missing)} is in none of its files")
    return opened


def _account(
    folder: Path,
    family: Family,
    model: ModelConfig,
    pieces: list[TensorMapping],
    files: Mapping[str, Any],
) -> dict[str, str]:
    """Stored name of every expected tensor; raises MismatchError unless all are accounted for."""
    expected = {name: piece for piece in pieces for name in _names(piece, model)}
    found: dict[str, str] = {}
    left = []
    for stored in files:
        name = stored if stored in expected else family.prefix + stored
        if name in expected:
            found[name] = stored
        elif not any(part in f".{stored}" for part in family.ignored):
            left.append(stored)
    if model.tied_embeddings and "lm_head.weight" in left:
        embed = next(piece.name for piece in pieces if piece.paths == ("embed",))
        head = files["lm_head.weight"].get_tensor("lm_head.weight")
        if embed in found and np.array_equal(head, files[found[embed]].get_tensor(found[embed])):
            left.remove("lm_head.weight")
    problems = [f"{name}: missing" for name in expected if name not in found]
    problems += [f"{name}: stored, and has no place in the model" for name in left]
    shapes = {piece.name: _shape(piece, model) for piece in pieces}
    for name, stored in found.items():
        header = files[stored].get_slice(stored)
        if header.get_dtype() not in _FORMATS:
            known = ", ".join(_FORMATS)
            problems.append(f"{name}: of number format {header.get_dtype()}; known: {known}")
        shape = tuple(header.get_shape())
        wanted = shapes[expected[name].name]
        if shape != wanted:
            problems.append(f"{name}: {list(shape)} stored, {list(wanted)} by config.json")
    if problems:
        shown = (
            problems if len(problems) <= 20 else [*problems[:20], f"and {len(problems) - 20} more"]
        )
        raise MismatchError(f"{folder}: tensors are not those of its config.json", shown)
    return found


def _names(piece: TensorMapping, model: ModelConfig) -> Iterator[str]:
    layers = range(model.layers) if piece.in_layer else [0]
    experts = range(model.moe.experts) if "{e}" in piece.name else [0]
    return (piece.name.format(i=i, e=e) for i in layers for e in experts)


def _shape(piece: TensorMapping, model: ModelConfig) -> tuple[int, ...]:
    """The shape of one tensor of a piece, from those of the parameters that it joins."""
    shapes = parameter_shapes(model)
    parts = []
    for path in piece.paths:
        shape = shapes[f"blocks/layer_0/{path}"][1:] if piece.in_layer else shapes[path]
        parts.append(np.broadcast_to(np.int8(0), shape[1:] if "{e}" in piece.name else shape))
    return piece.join(*parts).shape


@functools.lru_cache(maxsize=8)
def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter, by path."""
    # Any mesh will do, and one that is entered already cannot be left for a smaller one.
    entered = not jax.sharding.get_abstract_mesh().empty
    alone = jax.sharding.use_abstract_mesh(mesh.abstract_mesh())
    with contextlib.nullcontext() if entered else alone:
        tree = jax.eval_shape(lambda: decoder.init(model, jax.random.key(0)))
    return {path: leaf.shape for path, leaf in leaves_by_path(tree).items()}


@functools.lru_cache(maxsize=2)
def _abstract(model: ModelConfig, _: jax.sharding.Mesh) -> Params:
    """Shapes and layout of the parameters over the ambient mesh, which is the second argument."""
    return sharding.abstract(lambda: decoder.init(model, jax.random.key(0)))


# --- import ------------------------------------------------------------------------------------


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Float32 in memory that a CPU device takes as it is, where it would copy any other."""
    size = math.prod(shape)
    memory = np.empty(size + _ALIGNED // 4, np.float32)
    start = -memory.ctypes.data % _ALIGNED // 4
    return memory[start : start + size].reshape(shape)


def zeros(model: ModelConfig, dtype: str) -> Params:
    """Parameters that are zero, as decoding in `dtype` has them, laid out over the ambient mesh.

    On a CPU they take no memory: pages that nothing writes are all the same one.
    """
    abstract = _abstract(model, jax.sharding.get_mesh())

    def make(leaf: jax.ShapeDtypeStruct, kind: np.dtype) -> jax.Array:
        shape = leaf.sharding.shard_shape(leaf.shape)
        size = math.prod(shape) * kind.itemsize
        pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
        part = np.frombuffer(pages, kind).reshape(shape)
        shards = [jax.device_put(part, d) for d in leaf.sharding.addressable_devices]
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)

    return jax.tree.map(make, abstract, decoding.dtypes(abstract, dtype))


def read_params(source: Source, done: Callable[[int], None] = lambda count: None) -> Params:
    """The parameters in float32, laid out over the ambient mesh; tells how many are done.

    Every element of the source is exactly representable.
    """
    model = source.model
    pieces = source.family.pieces(model)
    place = {path: (piece, k) for piece in pieces for k, path in enumerate(piece.paths)}
    period = len(model.pattern)

    def parameter(path: str, layer: int, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a parameter of a layer; of experts, only those in the part are read."""
        piece, k = place[path]
        if "{e}" not in piece.name:
            return piece.split(source.tensor(piece.name.format(i=layer)))[k][index]
        each = [
            piece.split(source.tensor(piece.name.format(i=layer, e=e)))[k][index[1:]]
            for e in range(model.moe.experts)[index[0]]
        ]
        return np.stack(each)

    def share(path: str, leaf: jax.ShapeDtypeStruct, index: tuple[slice, ...]) -> np.ndarray:
        """One device's part of a parameter, in float32, filled layer by layer."""
        out = _aligned(leaf.sharding.shard_shape(leaf.shape))
        if not path.startswith("blocks/"):
            out[...] = parameter(path, 0, index)
            return out
        _, block, inner = path.split("/", 2)
        first = int(block.removeprefix("layer_"))

        def fill(at: int, row: int) -> None:
            out[at] = parameter(inner, row * period + first, index[1:])

        rows = range(leaf.shape[0])[index[0]]
        with ThreadPoolExecutor(_READERS) as pool:  # copies transpose, and leave Python free
            list(pool.map(fill, range(len(rows)), rows))
        return out

    def make(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        """Device by device, so that the host holds no more than one part."""
        shards: list[jax.Array] = []
        before: tuple[Any, np.ndarray] | None = None
        for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
            if before is None or before[0] != index:
                before = index, share(path, leaf, index)
            shards.append(jax.device_put(before[1], device))
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)

    abstract = _abstract(model, jax.sharding.get_mesh())
    leaves = {}
    for path, leaf in leaves_by_path(abstract).items():
        leaves[path] = make(path, leaf)
        done(len(leaves))
    return jax.tree.unflatten(jax.tree.structure(abstract), list(leaves.values()))


# --- export ------------------------------------------------------------------------------------


def tensors(params: Params, model: ModelConfig, family: Family) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of theirs, by name, in float32; a layer at a time is brought to the host."""
    leaves, period = leaves_by_path(params), len(model.pattern)
    for piece in family.pieces(model):
        experts = "{e}" in piece.name
        for layer in range(model.layers) if piece.in_layer else [0]:
            row, block = divmod(layer, period)
            parts = [
                jax.device_get(
                    leaves[f"blocks/layer_{block}/{path}"][row] if piece.in_layer else leaves[path]
                )
                for path in piece.paths
            ]
            if not experts:
                yield piece.name.format(i=layer), piece.join(*parts)
                continue
            for e in range(model.moe.experts):
                yield piece.name.format(i=layer, e=e), piece.join(*(part[e] for part in parts))


def cast(tensor: np.ndarray, dtype: str) -> np.ndarray:
    """In one of the number formats of safetensors files: F32, BF16, F16."""
    return np.ascontiguousarray(tensor.astype(_FORMATS[dtype], copy=False))


def write_folder(
    folder: Path,
    params: Params,
    model: ModelConfig,
    *,
    dtype: str = "F32",
    dtypes: Mapping[str, str] | None = None,
    extra: Json | None = None,
    beside: Mapping[str, np.ndarray] | None = None,
    instead: Json | None = None,
    done: Callable[[str], None] = lambda name: None,
) -> None:
    """Writes config.json and safetensors files of at most 4 GB, with an index if several.

    `dtypes` are the formats of single tensors that have another; `extra` goes into config.json
    where the model says nothing, `instead` where it does; `beside` are further tensors. Raises
    MismatchError where no family has this model.
    """
    from safetensors.numpy import save_file

    kind, config = families.family_of(model)
    config = {
        **(extra or {}),
        **config,
        "dtype": next(k for k, v in FORMATS_BY_NAME.items() if v == dtype),
        **(instead or {}),
    }
    shards: list[dict[str, np.ndarray]] = [{}]
    files: list[tuple[str, list[str]]] = []
    size = total = 0

    def flush() -> None:
        name = f".part-{len(files):05d}.safetensors"
        save_file(shards[0], folder / name, {"format": "pt"})
        files.append((name, list(shards[0])))
        shards[0] = {}

    own = tensors(params, model, families.FAMILIES[kind])
    for name, value in itertools.chain(own, (beside or {}).items()):
        value = cast(value, (dtypes or {}).get(name, dtype))
        if shards[0] and size + value.nbytes > _SHARD_BYTES:
            flush()
            size = 0
        shards[0][name] = value
        size, total = size + value.nbytes, total + value.nbytes
        done(name)
    flush()
    if len(files) == 1:
        (folder / files[0][0]).replace(folder / _SINGLE)
    else:
        weight_map = {}
        for number, (part, names) in enumerate(files, 1):
            final = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            (folder / part).replace(folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=2))


# --- the tokenizer beside them ---------------------------------------------------------------


def tokenizer_of(source: Source, say: Callable[[str], None]) -> tokenizers.Tokenizer | None:
    """The folder's own; or none, which is told, where it has none that can be used."""
    folder = source.folder
    why = "no tokenizer.json and no tokenizer.model"
    for kind, file in (("huggingface", "tokenizer.json"), ("sentencepiece", "tokenizer.model")):
        if (folder / file).exists():
            given = TokenizerConfig(kind=kind, path=str(folder / file))  # type: ignore[arg-type]
            try:
                tokenizer = tokenizers.make(given, ())
            except DataError as error:
                why = str(error)
                continue
            if tokenizer.vocab_size <= source.model.vocab_size:
                return tokenizer
            why = f"{file} has {tokenizer.vocab_size} pieces, the model {source.model.vocab_size}"
    say(f"{folder}: {why}; so the run cannot read text")
    return None
