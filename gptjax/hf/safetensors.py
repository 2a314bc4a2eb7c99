"""Hugging Face checkpoint folders: opened and checked, read as parameters, and written.

A tensor is read when it is needed. One device's shard of a parameter is filled layer by layer and
copied to the device before the next, so host memory holds one shard and two tensors beyond the
parameters on the devices. While a file is written, of up to 4 GB, all of it is in memory. Pickled
checkpoints are rejected: loading one runs code from it. families.py says which parameters a tensor
holds.
"""

import contextlib
import functools
import itertools
import json
import math
import mmap
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from gptjax.config import ModelConfig
from gptjax.config.limits import unusable
from gptjax.errors import DataError, MismatchError
from gptjax.hf import families
from gptjax.hf.carried_files import check_links
from gptjax.hf.config_keys import check_unused
from gptjax.hf.mapping import TensorMapping
from gptjax.hf.reader import Family, Json
from gptjax.model import decoder
from gptjax.model.decoder import Params
from gptjax.parallel import mesh, sharding
from gptjax.param_tree import leaves_by_path
from gptjax.sample import decoding

_INDEX = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"
_MAX_FILE_BYTES = 4_000_000_000
_DTYPES: dict[str, Any] = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
FORMATS_BY_NAME = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""The number formats of safetensors files that are read and written, by the names of dtypes."""
_ALIGNMENT = 64  # bytes
_READ_THREADS = 2
_SHOWN = 20  # problems that a message lists
_PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "consolidated*.pth")


# --- opening -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """An opened Hugging Face folder: config.json, the family and model it describes, the tensors.

    `notes` tells which files of the folder are not read, in sentences. `files` holds the open file
    of each tensor, by the name stored there, and `names` the stored name by the tensor's full name.
    """

    folder: Path
    config: Json
    family: Family
    model: ModelConfig
    notes: tuple[str, ...]
    files: Mapping[str, Any] = field(repr=False)
    names: Mapping[str, str] = field(repr=False)

    def tensor(self, name: str) -> np.ndarray:
        """A tensor by its full name, in the number format of the file."""
        stored = self.names[name]
        return self.files[stored].get_tensor(stored)

    def dtype(self, name: str) -> str:
        """The number format of a tensor: F32, BF16 or F16."""
        return str(self.files[self.names[name]].get_slice(self.names[name]).get_dtype())


def open_source(folder: Path, extra_tensors: Collection[str] = ()) -> Source:
    """Opens a folder and accounts for every tensor in it; reads none of their values.

    `extra_tensors` are names of tensors that the folder has beside the model's. Raises DataError
    for a folder or file that cannot be used, MismatchError for a model that is not supported, for
    keys of config.json that are not known, and for tensors that are missing, unexpected or of
    another shape.
    """
    config_file = folder / "config.json"
    if not config_file.exists():
        raise DataError(f"{folder}: no config.json; give a folder of a Hugging Face model")
    try:
        config = json.loads(config_file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{config_file}: cannot be read as JSON: {error}") from None
    if not isinstance(config, dict):
        raise DataError(f"{config_file}: must hold an object")
    check_links(folder)
    family, model, unused = families.read_config(config, str(config_file))
    check_unused(config, unused, str(config_file))
    files, notes = _open_files(folder)
    own = {name: file for name, file in files.items() if name not in extra_tensors}
    names = _match_tensors(folder, family, model, own)
    return Source(
        folder,
        config,
        family,
        model,
        notes,
        files,
        names | {name: name for name in extra_tensors},
    )


def _open_files(folder: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The open safetensors file of each tensor, by the name that it has there; notes.

    As in `transformers`, a whole file comes before an index and its files; an index says which file
    each tensor is read from.
    """
    weight_map: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    if (folder / _SINGLE_FILE).exists():
        file_names = [_SINGLE_FILE]
        others = [path.name for path in sorted(folder.glob("model-*-of-*.safetensors"))]
        others += [_INDEX] * (folder / _INDEX).exists()
        if others:
            notes = (f"{folder}: {_SINGLE_FILE} is read, and {', '.join(others)} beside it is not",)
    elif (folder / _INDEX).exists():
        try:
            weight_map = dict(json.loads((folder / _INDEX).read_text())["weight_map"])
            file_names = sorted(set(weight_map.values()))
            bad = [name for name in file_names if Path(name).name != name or unusable(name)]
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise DataError(f"{folder / _INDEX}: cannot be read ({error!r})") from None
        if bad:
            raise DataError(f"{folder / _INDEX}: names a file outside its folder: {bad[0]!r}")
    elif any(next(folder.glob(pattern), None) for pattern in _PICKLED):
        raise DataError(
            f"{folder}: holds pickled weights only, and loading a pickle runs code from it. In an "
            'environment that you can throw away: python -c "from transformers import '
            f"AutoModelForCausalLM as M; M.from_pretrained('{folder}').save_pretrained('SAFE')\""
        )
    else:
        raise DataError(f"{folder}: no {_SINGLE_FILE} and no {_INDEX}")
    opened: dict[str, Any] = {}
    for name in file_names:
        handle = _open_file(folder / name)
        own = {key for key in handle.keys() if weight_map.get(key, name) == name}  # noqa: SIM118
        opened |= dict.fromkeys(own, handle)
    if missing := set(weight_map) - set(opened):
        first = min(missing)
        raise DataError(f"{folder / _INDEX}: {first} is not in {weight_map[first]}, as it says")
    return opened, notes


def _open_file(path: Path) -> Any:
    """An open safetensors file. Raises DataError."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "np")
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: cannot be read as safetensors: {error}") from None


def _match_tensors(
    folder: Path, family: Family, model: ModelConfig, files: Mapping[str, Any]
) -> dict[str, str]:
    """The stored name of every tensor of the model, by its full name.

    Raises MismatchError unless each is there, of the right shape, and nothing else is.
    """
    mappings = family.mappings(model)
    expected = {name: mapping for mapping in mappings for name in mapping.tensor_names(model)}
    found: dict[str, str] = {}
    unexpected = []
    for stored in files:
        name = stored if stored in expected else family.prefix + stored
        if name in expected:
            found[name] = stored
        elif not any(part in f".{stored}" for part in family.ignored):
            unexpected.append(stored)
    if model.tied_embeddings and "lm_head.weight" in unexpected:
        embed = next(mapping.name for mapping in mappings if mapping.paths == ("embed",))
        head = files["lm_head.weight"].get_tensor("lm_head.weight")
        if embed in found and np.array_equal(head, files[found[embed]].get_tensor(found[embed])):
            unexpected.remove("lm_head.weight")
    problems = [f"{name}: missing" for name in expected if name not in found]
    problems += [f"{name}: unexpected; the model has no such tensor" for name in unexpected]
    shapes = {mapping.name: _tensor_shape(mapping, model) for mapping in mappings}
    for name, stored in found.items():
        header = files[stored].get_slice(stored)
        dtype, shape = header.get_dtype(), tuple(header.get_shape())
        if dtype not in _DTYPES:
            problems.append(f"{name}: number format {dtype}; supported: {', '.join(_DTYPES)}")
        if shape != (wanted := shapes[expected[name].name]):
            problems.append(f"{name}: shape {list(shape)}; by config.json {list(wanted)}")
    if problems:
        more = len(problems) - _SHOWN
        shown = [*problems[:_SHOWN], *([f"and {more} more"] if more > 0 else [])]
        raise MismatchError(f"{folder}: tensors are not those of its config.json", shown)
    return found


def _tensor_shape(mapping: TensorMapping, model: ModelConfig) -> tuple[int, ...]:
    """The shape of a mapping's tensor, from the shapes of the parameters it holds."""
    shapes = parameter_shapes(model)
    params = []
    for path in mapping.paths:
        shape = shapes[f"blocks/layer_0/{path}"][1:] if mapping.per_layer else shapes[path]
        # An array of one element in memory: only shapes matter.
        params.append(np.broadcast_to(np.int8(0), shape[1:] if mapping.per_expert else shape))
    return mapping.to_tensor(*params).shape


@functools.lru_cache(maxsize=8)
def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by path."""
    # Shapes are the same on any mesh, and an entered mesh cannot be replaced by a smaller one.
    entered = not jax.sharding.get_abstract_mesh().empty
    one_device = jax.sharding.use_abstract_mesh(mesh.abstract_mesh())
    with contextlib.nullcontext() if entered else one_device:
        tree = jax.eval_shape(lambda: decoder.init(model, jax.random.key(0)))
    return {path: leaf.shape for path, leaf in leaves_by_path(tree).items()}


@functools.lru_cache(maxsize=2)
def _abstract(model: ModelConfig, _: jax.sharding.Mesh) -> Params:
    """Shapes and shardings of the parameters on the ambient mesh.

    The second argument is that mesh, so that each has an entry of its own in the cache.
    """
    return sharding.abstract(lambda: decoder.init(model, jax.random.key(0)))


# --- reading -----------------------------------------------------------------------------------


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array, aligned so that a CPU device takes its memory over without a copy."""
    size = math.prod(shape)
    memory = np.empty(size + _ALIGNMENT // 4, np.float32)
    start = -memory.ctypes.data % _ALIGNMENT // 4
    return memory[start : start + size].reshape(shape)


def zeros(model: ModelConfig, dtype: str) -> Params:
    """Parameters of zeros on the ambient mesh, in the dtypes of decoding in `dtype`.

    On a CPU they take no memory: pages that are never written are all the same one.
    """
    abstract = _abstract(model, jax.sharding.get_mesh())

    def make(leaf: jax.ShapeDtypeStruct, dtype: np.dtype) -> jax.Array:
        shape = leaf.sharding.shard_shape(leaf.shape)
        size = math.prod(shape) * dtype.itemsize
        pages = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
        shard = np.frombuffer(pages, dtype).reshape(shape)
        shards = [jax.device_put(shard, d) for d in leaf.sharding.addressable_devices]
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)

    return jax.tree.map(make, abstract, decoding.dtypes(abstract, dtype))


def read_params(source: Source, done: Callable[[int], None] = lambda count: None) -> Params:
    """The parameters in float32 on the ambient mesh; every element is represented exactly.

    `done` is called after each parameter with the number of those read.
    """
    abstract = _abstract(source.model, jax.sharding.get_mesh())
    reader = _ParamReader(source)
    leaves = {}
    for path, leaf in leaves_by_path(abstract).items():
        leaves[path] = reader.array(path, leaf)
        done(len(leaves))
    return jax.tree.unflatten(jax.tree.structure(abstract), list(leaves.values()))


class _ParamReader:
    """Makes parameters from the tensors of a folder."""

    def __init__(self, source: Source) -> None:
        self._source, self._model = source, source.model
        # By path: the mapping that has the parameter, and its place among the mapping's paths.
        self._mapping = {
            path: (mapping, k)
            for mapping in source.family.mappings(source.model)
            for k, path in enumerate(mapping.paths)
        }

    def array(self, path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        """A parameter, made device by device so that the host holds one shard at a time."""
        shards: list[jax.Array] = []
        last: tuple[Any, np.ndarray] | None = None
        for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
            if last is None or last[0] != index:
                last = index, self._shard(path, leaf, index)
            shards.append(jax.device_put(last[1], device))
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)

    def _shard(self, path: str, leaf: jax.ShapeDtypeStruct, index: tuple[slice, ...]) -> np.ndarray:
        """One device's shard of a parameter, in float32, filled layer by layer."""
        out = _aligned(leaf.sharding.shard_shape(leaf.shape))
        if not path.startswith("blocks/"):
            out[...] = self._slice(path, 0, index)
            return out
        _, block, inner = path.split("/", 2)
        period, first = len(self._model.pattern), int(block.removeprefix("layer_"))

        def fill(at: int, repeat: int) -> None:
            out[at] = self._slice(inner, repeat * period + first, index[1:])

        repeats = range(leaf.shape[0])[index[0]]  # of the pattern's blocks
        with ThreadPoolExecutor(_READ_THREADS) as pool:  # numpy's copies release Python's lock
            list(pool.map(fill, range(len(repeats)), repeats))
        return out

    def _slice(self, path: str, layer: int, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of one layer's parameter; of experts, only those in the slice are read."""
        mapping, k = self._mapping[path]
        tensor = self._source.tensor
        if not mapping.per_expert:
            return mapping.to_params(tensor(mapping.name.format(i=layer)))[k][index]
        experts = range(self._model.moe.experts)[index[0]]
        names = [mapping.name.format(i=layer, e=e) for e in experts]
        return np.stack([mapping.to_params(tensor(name))[k][index[1:]] for name in names])


# --- writing -----------------------------------------------------------------------------------


def tensors(params: Params, model: ModelConfig, family: Family) -> Iterator[tuple[str, np.ndarray]]:
    """The name and value of every tensor of the checkpoint, in float32.

    Parameters are copied to the host one layer at a time.
    """
    leaves, period = leaves_by_path(params), len(model.pattern)
    for mapping in family.mappings(model):
        for layer in range(model.layers) if mapping.per_layer else [0]:
            repeat, block = divmod(layer, period)
            values = [
                jax.device_get(
                    leaves[f"blocks/layer_{block}/{path}"][repeat]
                    if mapping.per_layer
                    else leaves[path]
                )
                for path in mapping.paths
            ]
            if not mapping.per_expert:
                yield mapping.name.format(i=layer), mapping.to_tensor(*values)
                continue
            for e in range(model.moe.experts):
                name = mapping.name.format(i=layer, e=e)
                yield name, mapping.to_tensor(*(value[e] for value in values))


def cast(tensor: np.ndarray, dtype: str) -> np.ndarray:
    """The tensor in a number format of safetensors files: F32, BF16 or F16."""
    return np.ascontiguousarray(tensor.astype(_DTYPES[dtype], copy=False))


def write_folder(
    folder: Path,
    params: Params,
    model: ModelConfig,
    *,
    dtype: str = "F32",
    dtypes: Mapping[str, str] | None = None,
    extra_config: Json | None = None,
    config_overrides: Json | None = None,
    extra_tensors: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes config.json and safetensors files of at most 4 GB, with an index if there are several.

    `dtype` is the number format of all tensors but those in `dtypes`, which has theirs by name. In
    config.json the model's keys take precedence over `extra_config`, and `config_overrides` over
    both. `extra_tensors` are written beside the model's. Raises MismatchError for a model that no
    family has.
    """
    kind, config = families.family_of(model)
    config = {
        **(extra_config or {}),
        **config,
        "dtype": next(k for k, v in FORMATS_BY_NAME.items() if v == dtype),
        **(config_overrides or {}),
    }
    own = tensors(params, model, families.FAMILIES[kind])
    writer = _TensorWriter(folder)
    for name, value in itertools.chain(own, (extra_tensors or {}).items()):
        writer.add(name, cast(value, (dtypes or {}).get(name, dtype)))
    writer.finish()
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def save_tensors(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Writes a safetensors file, readable by those that may read other new files of the user."""
    from safetensors.numpy import save_file

    with path.open("wb") as file:
        mode = os.fstat(file.fileno()).st_mode
    save_file(dict(tensors), path, {"format": "pt"})  # which makes a file for its owner alone
    path.chmod(mode)


class _TensorWriter:
    """Writes tensors to safetensors files of at most _MAX_FILE_BYTES, unless one tensor is larger.

    Files get their names at the end, when their number is known.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: dict[str, np.ndarray] = {}
        self._files: list[tuple[str, list[str]]] = []  # each one's name, and its tensors' names
        self._size = self._total = 0

    def add(self, name: str, tensor: np.ndarray) -> None:
        if self._pending and self._size + tensor.nbytes > _MAX_FILE_BYTES:
            self._flush()
        self._pending[name] = tensor
        self._size += tensor.nbytes
        self._total += tensor.nbytes

    def finish(self) -> None:
        """Writes the last file, names all of them, and writes the index of several."""
        self._flush()
        if len(self._files) == 1:
            (self._folder / self._files[0][0]).replace(self._folder / _SINGLE_FILE)
            return
        weight_map: dict[str, str] = {}
        for number, (part, names) in enumerate(self._files, 1):
            final = f"model-{number:05d}-of-{len(self._files):05d}.safetensors"
            (self._folder / part).replace(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        (self._folder / _INDEX).write_text(json.dumps(index, indent=2))

    def _flush(self) -> None:
        name = f".part-{len(self._files):05d}.safetensors"
        save_tensors(self._pending, self._folder / name)
        self._files.append((name, list(self._pending)))
        self._pending, self._size = {}, 0
