"""Ahead-of-time (AOT) compilation of the real step by the accelerator's compiler, with none.

`libtpu` (the extra `tpu-plan`) compiles for any slice of TPUs, JAX's CUDA plugin (the extra
`gpu-plan`) for nodes of GPUs. Read from the compiled program: its memory by XLA's own account, and
its collectives, with their mesh axes, the trip counts of the loops around them, and whether they
overlap with arithmetic.
"""

import contextlib
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from gptjax.config import Config, ModelConfig
from gptjax.errors import ConfigError
from gptjax.model import decoder
from gptjax.parallel import sharding
from gptjax.parallel.mesh import make_mesh
from gptjax.plan import cudnn_library, gpu_compiler
from gptjax.plan.collectives import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    PERMUTE,
    REDUCE_SCATTER,
    Collective,
    step_shape,
)
from gptjax.plan.machines import Machine
from gptjax.plan.memory import cudnn_workspace
from gptjax.sample import decoding, engine
from gptjax.training import objective, step


@dataclass
class Compiled:
    """A compiled program's memory, communication and warnings; bytes and counts are of one device.

    seconds: of compilation. peak: most bytes at once, arguments included. workspace: of the peak,
    cuDNN's by formula; 0 where its library was asked, as the program then has it. out_of_memory:
    XLA's message where the program does not fit. text: the program itself, as XLA prints it.
    """

    seconds: float
    peak: float = 0.0
    workspace: float = 0.0
    arguments: float = 0.0
    collectives: list[Collective] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    out_of_memory: str | None = None
    text: str = field(default="", repr=False)

    def fits(self, memory: float) -> bool:
        """Whether it runs in so many bytes; XLA refuses what is too large for TPUs alone."""
        return self.out_of_memory is None and self.peak <= memory


def devices(machine: Machine) -> list[Any]:
    """Descriptions of a machine's devices, to compile programs for.

    Raises ConfigError where there is no compiler for the machine.
    """
    if machine.device.platform == "gpu":
        return gpu_compiler.devices(machine)
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ConfigError(
            ["--compile: needs the TPU's compiler: pip install 'gptjax[tpu-plan]'"]
        ) from None
    from jax.experimental import topologies

    name = {"v7x": "tpu7x"}.get(machine.device.name, machine.device.name)
    name += ":" + "x".join(map(str, machine.shape))
    more = {"num_slices": machine.slices} if machine.slices > 1 else {}
    with _captured_stderr():
        try:
            found = list(topologies.get_topology_desc(name, "tpu", **more).devices)
        except jax.errors.JaxRuntimeError as error:
            why = f"libtpu knows no such slice: {str(error).splitlines()[0]}"
            raise ConfigError([f"--compile: {machine.name}: {why}"]) from None
    if len(found) != machine.devices:
        why = f"libtpu describes {len(found)} devices there, where a run has {machine.devices}"
        raise ConfigError([f"--compile: {machine.name}: {why}; leave --compile away"])
    return found


def train_step(cfg: Config, machine: Machine) -> Compiled:
    """The train step of a configuration, compiled for a machine."""
    mesh = make_mesh(cfg.mesh, devices(machine))
    with jax.set_mesh(mesh):
        state = sharding.abstract(
            lambda: step.create_state(cfg, lambda key: decoder.init(cfg.model, key))
        )
        loss_fn = objective.training_loss(cfg, eos_id=0)
        batch = objective.abstract_batch(cfg)
        found = _compile(lambda: step.compile_step(cfg, loss_fn, state, batch), mesh)
        shape = step_shape(cfg, dict(mesh.shape), objective.attention_backends(cfg))
        workspace = 0.0
        if machine.device.platform == "gpu" and cudnn_library.why_not():
            workspace = cudnn_workspace(shape, machine.device)
        return replace(found, peak=found.peak + workspace, workspace=workspace)


def sampling(cfg: Config, machine: Machine, prompt: int = 2048) -> Iterator[tuple[str, Compiled]]:
    """The sampler's programs on the same mesh: a chunk's prefill, and decoding.

    One slot for each device of the batch's axes, in the compute dtype, with caches for the
    prompt and as many new tokens.
    """
    mesh = make_mesh(cfg.mesh, devices(machine))
    with jax.set_mesh(mesh):
        slots, capacity = sharding.axis_size("batch"), min(2 * prompt, cfg.model.context)
        params, model = _decoding_params(cfg)
        caches = sharding.abstract(
            lambda: decoder.empty_caches(model, slots, capacity, cfg.compute.dtype, engine.CHUNK)
        )
        chunk = (_batched((slots, engine.CHUNK)),) * 2
        prefill = decoding.prefill.lower(params, chunk, caches, model, cfg.compute)
        yield (
            f"prefill {slots} x {engine.CHUNK} tokens",
            _compile(lambda: prefill.compile(), mesh),
        )
        empty = engine.empty_slots(slots, model.table, engine.EngineLimits())
        scalar = jax.ShapeDtypeStruct((), np.int32)
        burst = decoding.burst.lower(
            params,
            jax.tree.map(lambda a: _batched(a.shape, a.dtype), empty),
            caches,
            scalar,
            jax.ShapeDtypeStruct((), np.bool_),
            scalar,
            decoding.DecodeConfig(model, cfg.compute, sampling=True, truncation=True),
        )
        yield (
            f"decode {slots} slots, {capacity} tokens",
            _compile(lambda: burst.compile(), mesh),
        )


def _decoding_params(cfg: Config) -> tuple[Any, ModelConfig]:
    """Abstract parameters for decoding, and the model that they are of."""
    models = []

    def params() -> Any:
        start = decoder.init(cfg.model, jax.random.key(0))
        params, model = decoding.decoding_params(start, cfg.model, cfg.compute.dtype)
        models.append(model)
        return params

    return sharding.abstract(params), models[0]


def _batched(shape: tuple[int, ...], dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
    """An abstract array whose leading dimension is split over the batch's axes."""
    spec = sharding.spec("batch", *[None] * (len(shape) - 1))
    mesh = jax.sharding.get_mesh()
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))


def _compile(compile_: Callable[[], Any], mesh: jax.sharding.Mesh) -> Compiled:
    began = time.monotonic()
    with _captured_stderr() as log:
        try:
            program = compile_()
        except jax.errors.JaxRuntimeError as error:
            if "cuda_dnn.cc" in str(error):
                raise _no_graph(str(error)) from None
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Compiled(time.monotonic() - began, out_of_memory=str(error))
    seconds = time.monotonic() - began
    memory, text = program.memory_analysis(), program.as_text()
    return Compiled(
        seconds,
        peak=memory.peak_memory_in_bytes,
        arguments=memory.argument_size_in_bytes,
        collectives=program_collectives(text, dict(mesh.shape)),
        warnings=_warnings(log()),
        text=text,
    )


def _no_graph(message: str) -> ConfigError:
    """The error of an attention that cuDNN refuses, from XLA's message."""
    why = message.removeprefix("INTERNAL: ").split("\n")[0].split(" in external/")[0]
    library = f"cuDNN {cudnn_library.version()}"
    return ConfigError(
        [
            f"compute.attention: {library} has no such attention: {why}; plan for "
            "compute.attention=ring, or train with reference"
        ]
    )


@contextlib.contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    """Captures the standard error of native code, too; yields a function that returns it."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)

        def read() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        text: list[str] = []
        try:
            yield lambda: text[0] if text else read()
        finally:
            text.append(read())
            os.dup2(kept, 2)
            os.close(kept)


def _warnings(log: str) -> list[str]:
    """The compiler's warnings, as advice."""
    advice = []
    if "nvoluntary full rematerialization" in log:
        names = sorted(set(re.findall(r"op_name=\"([^\"]+)\"", log)))
        advice.append(
            "an array is gathered whole to be laid out anew (involuntary full rematerialization): "
            + (", ".join(names) or "no name given")
            + "; choose mesh sizes that divide the batch and the heads"
        )
    return advice


def requested_gib(message: str) -> float:
    """GiB of temporaries that an out-of-memory message of XLA names; 0 if it names none."""
    match = re.search(r"\(([\d.]+)([GM])\) exceeds", message)
    return float(match[1]) / (1 if match[2] == "G" else 1024) if match else 0.0


# --- reading a program ----------------------------------------------------------------------------

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_OP = re.compile(
    r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|"
    r"collective-permute)(-start)?\("
)
# Between slices: a transfer through the hosts, whose attributes say what it is.
_BETWEEN_SLICES = re.compile(
    r"^\s+(?:ROOT )?%?([\w.\-]+) = \((\w+\[[\d,]*\]).* send\(.*"
    r'_xla_megascale_transfer_type="(ALL_REDUCE|ALL_GATHER|REDUCE_SCATTER|ALL_TO_ALL)"'
)
_TRANSFERS = {
    "ALL_REDUCE": ALL_REDUCE,
    "ALL_GATHER": ALL_GATHER,
    "REDUCE_SCATTER": REDUCE_SCATTER,
    "ALL_TO_ALL": ALL_TO_ALL,
}
_CALLEE = re.compile(
    r"(?:calls|body|to_apply|called_computations|branch_computations)=\{?%?([\w.\-]+)"
)
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1, "f64": 8}


def program_collectives(text: str, shape: Mapping[str, int]) -> list[Collective]:
    """Every collective of a program in HLO text, with the mesh axes of its groups.

    `shape` are the sizes of the mesh by axis. Collectives in a loop are those of the layers.
    """
    bodies, entry = _computations(text)
    found: dict[tuple[str, str], Collective] = {}

    def visit(computation: str, runs: float, where: str, overlapped: bool) -> None:
        lines = bodies.get(computation, [])
        for i, line in enumerate(lines):
            if loop := _WHILE.search(line):
                trips = _trip_count(line, bodies[loop[1]])
                visit(loop[2], runs * trips, "layers", overlapped)
            elif named := _collective(line, shape, computation):
                key, one = named
                overlaps, at = overlapped or one.overlapped, where
                if _OF_GPU in line or one.kind == PERMUTE:
                    overlaps = one.overlapped and _works_meanwhile(lines[i + 1 :], key[1])
                if _OF_GPU in line:
                    # The loop of the backward pass has its first or last turn outside.
                    at = "layers" if "while/body" in one.purpose else where
                found.setdefault(key, replace(one, count=runs, where=at, overlapped=overlaps))
            else:
                async_ = "async_execution_thread" in line or "async-collective" in line
                for callee in _CALLEE.findall(line):
                    visit(callee, runs, where, overlapped or async_)

    visit(entry, 1.0, "outside", False)
    return [one for one in found.values() if one.group > 1]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation of a program, and the name of its entry."""
    bodies: dict[str, list[str]] = {}
    entry, name = "", None
    for line in text.splitlines():
        if match := _HEADER.match(line):
            name = match[1]
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name is not None:
            bodies[name].append(line)
    return bodies, entry


def _trip_count(loop: str, condition: list[str]) -> int:
    """The trip count of a loop: as XLA has noted it, or the constant that its condition compares
    the counter with.
    """
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop):
        return int(noted[1])
    bounds = [
        int(n) for line in condition for n in re.findall(r" s32\[\]\S* constant\((\d+)\)", line)
    ]
    return max(bounds, default=1)


_OF_GPU = '"is_sync":'  # in the attributes of a GPU's collective
_WORK = re.compile(r" (?:fusion|custom-call|while)\(")


def _works_meanwhile(lines: list[str], start: str) -> bool:
    """Whether anything is computed in the lines from a collective's start to its end."""
    done = re.compile(rf"-done\(%?{re.escape(start)}\)")
    for line in lines:
        if done.search(line):
            return False
        if _WORK.search(line):
            return True
    return False


def _collective(
    line: str, shape: Mapping[str, int], computation: str
) -> tuple[tuple[str, str], Collective] | None:
    """The collective of a line, if it has one, and a key that is the same for all its parts."""
    if match := _BETWEEN_SLICES.match(line):
        name, type_, transfer = match.groups()
        kind, slices = _TRANSFERS[transfer], shape["data"]
        size = _size(type_) * (1 if kind == ALL_REDUCE else slices)
        return (computation, name), Collective(kind, ("data",), slices, size, 1, "between slices")
    if not (match := _OP.match(line)):
        return None
    name, type_, kind, start = match.groups()
    axes = _axes(line, shape)
    group = math.prod(shape[axis] for axis in axes)
    size = _size(type_)
    if start and kind == ALL_GATHER:  # the operands stand beside the results
        size *= group / (group + 1)
    elif start and kind == REDUCE_SCATTER:
        size *= 1 / (group + 1)
    elif start and (kind == PERMUTE or type_.startswith("((")):
        size /= 2
    if kind == REDUCE_SCATTER:
        size *= group
    if kind == ALL_REDUCE and computation.startswith("all-reduce-scatter"):
        kind = REDUCE_SCATTER
    # A gather fused into several fusions appears in each; its chain names it once.
    chain = re.search(r'chain_id="(\d+)"', line)
    synchronous = '"is_sync":true' in line
    async_ = not synchronous and (bool(start or chain) or computation.startswith("async_coll"))
    op = re.search(r'op_name="([^"]*)"', line)
    one = Collective(kind, axes, group, size, 1, op[1] if op else "", overlapped=async_)
    return ("chain", chain[1]) if chain else (computation, name), one


def _size(type_: str) -> float:
    """Bytes of a type, or of all of a tuple's."""
    arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", type_)
    count = lambda dims: math.prod(map(int, dims.split(","))) if dims else 1
    return float(sum(count(dims) * _BYTES.get(dtype, 4) for dtype, dims in arrays))


def _axes(line: str, shape: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which a collective's groups run."""
    sizes = tuple(shape.values())
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        # Of this mesh or of one that XLA has made of it: devices are numbered alike in both.
        dims = {axis: int(n) for axis, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        along = re.findall(r"'(\w+)'", named[2])
        ids = np.arange(math.prod(dims.values())).reshape(tuple(dims.values()))
        first = tuple(slice(None) if axis in along else 0 for axis in dims)
        group = ids[first].reshape(-1).tolist()
    elif listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        group = [int(n) for n in listed[1].split(",")]
    elif iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        order = [int(n) for n in iota[3].split(",")]
        ids = np.arange(math.prod(order)).reshape(order)
        if iota[4]:
            ids = ids.transpose([int(n) for n in iota[4].split(",")])
        group = ids.reshape(int(iota[1]), int(iota[2]))[0].tolist()
    elif pair := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        group = [int(pair[1]), int(pair[2])]
    else:
        group = list(range(math.prod(sizes)))
    coordinates = np.array(np.unravel_index(group, sizes))
    moving = (coordinates != coordinates[:, :1]).any(1)
    return tuple(axis for axis, moves in zip(shape, moving, strict=True) if moves)
