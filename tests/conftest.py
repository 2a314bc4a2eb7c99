"""Eight virtual CPU devices, meshes over the first few of them, and a model that is small."""

import os
import tempfile

# Many tests compile the same programs. Their results are kept for the session in a folder that
# workers and subprocesses inherit; it is removed when the process that made it ends. Reading a
# program that compiles faster than this would take longer than compiling it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compilation_cache = tempfile.TemporaryDirectory(prefix="gptjax-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compilation_cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.05"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)

import functools
import gc
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

# PyTorch's compiler crashes the process if it is imported after TensorFlow, and which of the two a
# worker needs first is chance.
if importlib.util.find_spec("triton"):
    importlib.import_module("triton")

import jax
import numpy as np
import pytest

from gptjax.cli import main
from gptjax.config import Config, MeshConfig, ModelConfig
from gptjax.model import decoder
from gptjax.parallel import sharding
from gptjax.parallel.mesh import make_mesh
from gptjax.runtime import compilation_cache, malloc

# What JAX traces lives as long as the session: looking for garbage in it takes a tenth of the time.
gc.freeze()
gc.set_threshold(100_000, 20, 100)

MeshFactory = Callable[..., AbstractContextManager[jax.sharding.Mesh]]


@pytest.fixture(scope="session", autouse=True)
def session_cache() -> Iterator[None]:
    """Keeps the session's compilation cache where a command would turn to the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation_cache, "enable_cache", lambda folder: None)
        yield


@functools.cache
def abstract_params(model: ModelConfig, mesh: jax.sharding.Mesh) -> decoder.Params:
    """Shapes and shardings of a model's parameters on the ambient mesh, which is `mesh`."""
    return sharding.abstract(lambda: decoder.init(model, jax.random.key(0)))


@pytest.fixture(scope="session")
def on_mesh() -> MeshFactory:
    """`with on_mesh(data, fsdp, tensor, expert, context, stage):` is on a mesh over the first
    devices."""

    @contextmanager
    def enter(
        data: int = 1,
        fsdp: int = 1,
        tensor: int = 1,
        expert: int = 1,
        context: int = 1,
        stage: int = 1,
    ) -> Iterator[jax.sharding.Mesh]:
        cfg = MeshConfig(data, fsdp, expert, tensor, context, stage)
        devices = jax.devices()[: math.prod((data, fsdp, tensor, expert, context, stage))]
        mesh = make_mesh(cfg, devices)
        with jax.set_mesh(mesh):
            yield mesh

    return enter


@pytest.fixture
def command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in this process: exit code, standard output, standard error."""
    monkeypatch.setattr(malloc, "keep_memory", lambda: False)

    def call(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main.main([str(word) for word in argv])
        except SystemExit as exit:  # argparse and tyro
            code = exit.code or 0
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., ModelConfig]:
    """A ModelConfig that compiles in a moment and that eight devices divide; fields as given."""
    return lambda **fields: replace(
        ModelConfig(vocab_size=128, context=32, layers=2, embed=32, heads=8), **fields
    )


@pytest.fixture(scope="session")
def tiny_config(tiny_model) -> Callable[..., Config]:
    """A Config of the tiny model and 16 rows of 32 tokens; sections by name, as mappings."""

    def make(**sections: Mapping[str, Any]) -> Config:
        base = replace(Config(), model=tiny_model())
        base = replace(base, train=replace(base.train, seq_len=32, batch_tokens=512, tokens=51200))
        changed = {name: replace(getattr(base, name), **f) for name, f in sections.items()}
        return replace(base, **changed)

    return make


@pytest.fixture(scope="session")
def random_params() -> Callable[..., decoder.Params]:
    """Parameters on the ambient mesh, none of them zero or one, so that each of them counts.

    Drawn on the host: initialising costs seconds of compilation.
    """

    def make(model: ModelConfig, std: float = 0.3) -> decoder.Params:
        rng = np.random.default_rng(0)

        def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
            mean = float(path[-1].key.endswith("scale"))
            return jax.device_put(np.float32(rng.normal(mean, std, leaf.shape)), leaf.sharding)

        abstract = abstract_params(model, jax.sharding.get_mesh())
        return jax.tree_util.tree_map_with_path(draw, abstract)

    return make


@pytest.fixture(scope="module")
def quick_compile() -> Iterator[None]:
    """XLA without its costly optimisations: for modules that compare within a tolerance."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def byte_model(tiny_model):
    return tiny_model(vocab_size=258, context=64, layers=1, embed=16)


@pytest.fixture(scope="module")
def byte_params(on_mesh, byte_model, random_params):
    """Random parameters on the host, the same for every mesh they are placed on."""
    with on_mesh(1):
        return jax.device_get(random_params(byte_model, std=0.5))


@pytest.fixture(scope="session")
def put():
    """Places host parameters of a model on the ambient mesh."""

    def place(params, model):
        abstract = abstract_params(model, jax.sharding.get_mesh())
        return jax.tree.map(lambda a, like: jax.device_put(a, like.sharding), params, abstract)

    return place
