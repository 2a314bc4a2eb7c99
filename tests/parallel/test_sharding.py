"""The same run on every mesh: bit-equal parameters at the start, and the same losses."""

import functools
import math
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoint.checkpointer import leaves_by_path
from gptjax.config import MeshConfig, ModelConfig
from gptjax.errors import ConfigError
from gptjax.model import decoder, init
from gptjax.parallel import arrays, sequence, sharding
from gptjax.parallel.mesh import AXES as MESH_AXES
from gptjax.parallel.mesh import arrange, make_mesh, rings
from gptjax.parallel.sharding import spec
from gptjax.training import objective
from gptjax.training.step import create_state, train_step

MESHES = {"1": (1, 1, 1), "8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "2x2x2": (2, 2, 2)}
STEPS = 5

pytestmark = pytest.mark.usefixtures("quick_compile")

# Logical axes of the tiny model's parameters; those of the blocks come after an axis of layers.
AXES = {
    "embed": ("vocab", "w_embed"),
    "positions": (None, "w_embed"),
    "q": ("layers", "w_embed", "heads", "head_dim"),
    "k": ("layers", "w_embed", "kv_heads", "head_dim"),
    "v": ("layers", "w_embed", "kv_heads", "head_dim"),
    "q_bias": ("layers", "heads", "head_dim"),
    "k_bias": ("layers", "kv_heads", "head_dim"),
    "v_bias": ("layers", "kv_heads", "head_dim"),
    "o": ("layers", "heads", "head_dim", "w_embed"),
    "up": ("layers", "w_embed", "mlp"),
    "up_bias": ("layers", "mlp"),
    "down": ("layers", "w_mlp", None),
}  # and o_bias, down_bias and the norms' scale and bias: on every device whole


@dataclass
class Run:
    """What one mesh did. Arrays are on the host."""

    initial: dict[str, np.ndarray]
    pieces: dict[str, tuple[int, ...]]  # shape of one device's piece
    last_pieces: dict[str, tuple[int, ...]]  # after the steps
    moments: dict[str, tuple[int, ...]]
    losses: list[float]


@pytest.fixture(scope="module")
def runs(on_mesh, tiny_config):
    cfg = tiny_config(optim={"lr": 1e-3, "warmup_tokens": 2048}, compute={"loss_chunks": 2})
    rng = np.random.default_rng(0)
    shape = (STEPS, cfg.train.batch, cfg.train.seq_len + 1)
    windows = rng.integers(0, cfg.model.vocab_size, shape, np.int32)
    lengths = np.full(cfg.train.batch, cfg.train.seq_len, np.int32)
    init_fn = lambda key: decoder.init(cfg.model, key)
    loss_fn = lambda params, batch, key: objective.next_token_loss(params, cfg, batch, 0, key)

    def run(*mesh):
        with on_mesh(*mesh):
            state = jax.jit(lambda: create_state(cfg, init_fn))()
            params = leaves_by_path(state.params)
            initial = jax.device_get(params)
            pieces = {path: x.addressable_shards[0].data.shape for path, x in params.items()}
            moments = leaves_by_path(state.opt_state)
            moments = {path: x.addressable_shards[0].data.shape for path, x in moments.items()}
            step = jax.jit(lambda s, b: train_step(cfg, loss_fn, s, b), donate_argnums=0)
            losses = []
            for rows in windows:
                batch = {"windows_BW": rows, "lengths_B": lengths}
                batch = {k: arrays.global_batch(v, cfg.train.batch) for k, v in batch.items()}
                state, metrics = step(state, batch)
                losses.append(float(metrics["loss"]))
            last = leaves_by_path(state.params)
            last = {path: x.addressable_shards[0].data.shape for path, x in last.items()}
        return Run(initial, pieces, last, moments, losses)

    return {name: run(*sizes) for name, sizes in MESHES.items()}


def expected_piece(path, shape, sizes):
    """Shape of one device's piece, as RULES has it."""
    axes = AXES.get(path.split("/")[-1], (None,) * len(shape))
    sizes = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    of = lambda name: math.prod(sizes.get(axis, 1) for axis in sharding.mesh_axes(name))
    parts = [1 if name is None else of(name) for name in axes]
    return tuple(n // p for n, p in zip(shape, parts, strict=True))


@pytest.mark.parametrize("name", list(MESHES))
@pytest.mark.slow
def test_parameters_are_sharded_as_the_rules_say_before_and_after_training(runs, name):
    run = runs[name]
    expected = {
        path: expected_piece(path, x.shape, MESHES[name]) for path, x in run.initial.items()
    }
    assert run.pieces == expected
    assert run.last_pieces == expected


@pytest.mark.parametrize("name", ["1x8x1", "2x2x2"])
@pytest.mark.slow
def test_optimizer_moments_are_sharded_like_their_parameters(runs, name):
    run = runs[name]
    moments = {path: piece for path, piece in run.moments.items() if piece}  # counts have no shape
    assert len(moments) == 2 * len(run.pieces)
    for path, piece in moments.items():
        assert piece == run.pieces[path.split("/", 2)[2]], path


@pytest.mark.slow
def test_the_meshes_shard_the_embedding_differently(runs):
    tables = {name: run.pieces["embed"] for name, run in runs.items()}
    assert tables == {"1": (128, 32), "8x1x1": (128, 32), "1x8x1": (128, 4), "2x2x2": (64, 16)}


@pytest.mark.parametrize("name", ["8x1x1", "1x8x1", "2x2x2"])
@pytest.mark.slow
def test_every_mesh_starts_from_the_same_bits_as_one_device(runs, name):
    one, other = runs["1"].initial, runs[name].initial
    assert one.keys() == other.keys()
    for path, x in one.items():
        assert x.tobytes() == other[path].tobytes(), path


@pytest.mark.parametrize("name", ["8x1x1", "1x8x1", "2x2x2"])
@pytest.mark.slow
def test_every_mesh_has_the_losses_of_one_device(runs, name):
    np.testing.assert_allclose(runs[name].losses, runs["1"].losses, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_losses_change_and_start_near_uniform(runs):
    losses = runs["1"].losses
    assert len(set(losses)) == STEPS
    assert losses[0] == pytest.approx(np.log(128), abs=0.1)


@pytest.mark.parametrize(
    ("kind", "platform", "target"),
    [
        ("NVIDIA H100 80GB HBM3", "gpu", ("gpu", (9, 0))),
        ("NVIDIA Unheard Of", "gpu", ("gpu", None)),
        ("TPU v5p", "tpu", ("tpu", None)),
    ],
)
def test_the_target_is_that_of_the_meshs_devices(kind, platform, target):
    device = jax.sharding.AbstractDevice(kind, None, platform)
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert sharding.target() == target


def test_two_dimensions_on_one_mesh_axis_are_an_error():
    with pytest.raises(ValueError, match="two dimensions on one mesh axis"):
        spec("heads", "mlp")
    with pytest.raises(ValueError, match="two dimensions on one mesh axis"):
        spec("batch", "w_embed")


def test_an_unknown_logical_axis_is_an_error():
    with pytest.raises(KeyError):
        spec("embedd")


def test_a_mesh_axis_of_minus_one_takes_the_devices_that_are_left():
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2))
    assert {axis: n for axis, n in mesh.shape.items() if n > 1} == dict.fromkeys(
        ("data", "fsdp", "tensor"), 2
    )


@pytest.mark.parametrize("sizes", [(-1, 3, 1), (2, 2, 1)])
def test_mesh_sizes_that_do_not_multiply_to_the_devices_are_refused(sizes):
    with pytest.raises(ConfigError, match=r"mesh.*8"):
        make_mesh(MeshConfig(*sizes))


@pytest.mark.parametrize("name", list(MESHES))
def test_one_process_has_all_rows_and_a_global_batch_keeps_them(on_mesh, name):
    data, fsdp, tensor = MESHES[name]
    local = np.arange(16 * 3, dtype=np.int32).reshape(16, 3)
    with on_mesh(data, fsdp, tensor):
        assert sharding.axis_size("batch") == data * fsdp
        assert sharding.axis_size("vocab") == tensor
        assert sharding.axis_size("embed") == 1
        np.testing.assert_array_equal(arrays.host_rows(16), np.arange(16))
        batch = arrays.global_batch(local, 16)
    np.testing.assert_array_equal(batch, local)
    assert {s.data.shape for s in batch.addressable_shards} == {(16 // (data * fsdp), 3)}


def test_a_process_has_the_rows_of_its_own_devices(on_mesh, monkeypatch):
    """As on two hosts of four devices each: the map of devices to rows cut to each one's own."""
    whole = jax.NamedSharding.addressable_devices_indices_map
    with on_mesh(4, 2, 1):
        some, others = [0, 1, 6, 7], [2, 3, 4, 5]  # as a torus may number them: rows with gaps
        for places, rows in ((some, [0, 1, 2, 3, 12, 13, 14, 15]), (others, [*range(4, 12)])):
            own = [jax.devices()[place] for place in places]
            cut = lambda self, shape, own=own: {
                d: index for d, index in whole(self, shape).items() if d in own
            }
            monkeypatch.setattr(jax.NamedSharding, "addressable_devices_indices_map", cut)
            assert arrays.host_rows(16).tolist() == rows


@pytest.mark.slow
def test_abstract_gives_shapes_and_layouts_without_making_anything(on_mesh, tiny_model, runs):
    run = runs["2x2x2"]
    with on_mesh(2, 2, 2):
        before = len(jax.live_arrays())
        tree = sharding.abstract(lambda: decoder.init(tiny_model(), jax.random.key(0)))
        assert len(jax.live_arrays()) == before
    abstract = leaves_by_path(tree)
    shapes = {path: (x.shape, x.dtype) for path, x in abstract.items()}
    assert shapes == {path: (x.shape, x.dtype) for path, x in run.initial.items()}
    pieces = {path: x.sharding.shard_shape(x.shape) for path, x in abstract.items()}
    assert pieces == run.pieces


def test_initialisers_draw_the_same_numbers_for_any_layout(on_mesh):
    def drawn(*mesh):
        with on_mesh(*mesh):
            make = lambda: init.normal(0.5)(jax.random.key(1), (64, 32), ("vocab", "w_embed"))
            return jax.device_get(jax.jit(make)())

    one = drawn(1, 1, 1)
    np.testing.assert_array_equal(one, drawn(2, 2, 2))
    np.testing.assert_array_equal(one, drawn(1, 8, 1))  # four columns a device
    assert one.std() == pytest.approx(0.5, rel=0.05)
    with on_mesh(2, 2, 2):
        ones = jax.jit(lambda: init.constant(1.5)(jax.random.key(0), (8,), ("mlp",)))()
    assert jnp.array_equal(ones, np.full(8, 1.5))


# --- rings of a torus ---------------------------------------------------------------------------


class Place:
    """Stands for a device, of which only the platform and the coordinates are asked."""

    def __init__(self, *coords, platform="tpu"):
        self.coords, self.platform = coords, platform


def line(*sizes, order=None):
    """Devices in row-major order of the given sizes, on the dimensions of the torus in `order`."""
    order = range(len(sizes)) if order is None else order
    indices = np.indices(sizes).reshape(len(sizes), -1).T
    return [Place(*[row[i] for i in order]) for row in indices]


@pytest.mark.parametrize(
    ("devices", "wanted"),
    [
        (line(4), (4, 1, 1)),
        (line(16, 16), (16, 16, 1)),
        (line(4, 8, order=(1, 0)), (4, 8, 1)),
        (line(4, 4, 8), (4, 4, 8)),
        (line(1, 4, 2), (4, 2, 1)),
        # Two nodes of eight GPUs: one axis, for NCCL knows better than a mesh what is near.
        ([Place(0, i // 8, i % 8, platform="gpu") for i in range(16)], (16, 1, 1)),
        ([Place(0, 0), Place(0, 1), Place(1, 1), Place(1, 0)], (4, 1, 1)),  # a snake
    ],
)
def test_a_line_of_devices_is_cut_into_the_rings_it_runs_through(devices, wanted):
    assert rings(devices) == wanted


@pytest.fixture(scope="module")
def start(on_mesh) -> Callable[[ModelConfig], decoder.Params]:
    """Returns a function that gives a model's initial parameters, drawn once, on the host."""

    @functools.cache
    def initial(model: ModelConfig) -> decoder.Params:
        with on_mesh():
            return jax.device_get(jax.jit(lambda: decoder.init(model, jax.random.key(0)))())

    return initial


@pytest.fixture(scope="module")
def known() -> dict[Any, Any]:
    """Results of the reference, computed when first needed."""
    return {}


@pytest.mark.parametrize("rings", [pytest.param((2, 2, 2), marks=pytest.mark.slow), (4, 2, 1)])
@pytest.mark.slow
def test_gathers_and_scatters_ring_by_ring_are_those_of_one_ring(
    tiny_config, start, put, known, rings
):
    """As on a torus, where fsdp is several mesh axes: the loss and every gradient."""
    cfg = tiny_config()
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 128, (16, 33), np.int32)
    batch = {"windows_BW": rows, "lengths_B": np.full(16, 32, np.int32)}

    def gradients(mesh):
        with jax.set_mesh(mesh):
            params = put(start(cfg.model), cfg.model)
            there = {k: arrays.global_batch(v, 16) for k, v in batch.items()}
            loss = lambda params: objective.next_token_loss(params, cfg, there, 0)
            return jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(params))

    one = make_mesh(MeshConfig(fsdp=8))
    shape = (1, 1, *rings, 1, 1, 1)
    several = jax.sharding.Mesh(
        np.array(jax.devices()[:8]).reshape(shape), MESH_AXES, one.axis_types
    )
    if "one ring" not in known:
        known["one ring"] = gradients(one)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-5),
        known["one ring"],
        gradients(several),
    )


# --- the context axis ---------------------------------------------------------------------------


def test_zigzag_chunks_have_equal_work_under_a_causal_mask(on_mesh):
    with on_mesh(context=4):
        places = sequence.zigzag_positions(64)
    assert sorted(places) == list(range(64))
    seen = (places.reshape(4, 16) + 1).sum(1)  # keys that each part's queries look at
    assert len(set(seen.tolist())) == 1
    with on_mesh(8):
        np.testing.assert_array_equal(sequence.zigzag_positions(64), np.arange(64))


@pytest.mark.parametrize("mesh", [{"context": 4}, {"data": 2, "context": 2}, {"fsdp": 8}])
def test_flatten_and_unflatten_are_inverse(on_mesh, mesh):
    a = np.arange(8 * 16 * 6, dtype=np.float32).reshape(8, 16, 6)
    with on_mesh(**mesh):
        there = jax.device_put(a, jax.NamedSharding(jax.sharding.get_mesh(), spec("batch")))

        def around(a):
            rows = sequence.flatten(a)
            sequences = sequence.unflatten(rows, 8, (2, 3), (None, None))
            assert jax.typeof(sequences).sharding.spec == spec("batch", "seq", None, None)
            again = sequence.flatten_zigzag(sequences, None)
            return rows, again, sequence.gather_natural(sequences)

        rows, again, back = jax.jit(around)(there)
    np.testing.assert_array_equal(rows, again)
    np.testing.assert_array_equal(np.asarray(back).reshape(a.shape), a)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "mesh"),
    [
        pytest.param("ring", {"context": 2}, marks=pytest.mark.slow),
        pytest.param("ring", {"context": 8}, marks=pytest.mark.slow),
        pytest.param("ring", {"data": 2, "context": 4}, marks=pytest.mark.slow),
        ("ring", {"fsdp": 2, "tensor": 2, "context": 2}),
        pytest.param("reference", {"data": 2, "context": 4}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("documents", [pytest.param("ignore", marks=pytest.mark.slow), "mask"])
def test_context_parallelism_has_the_loss_and_gradients_of_one_device(
    on_mesh, tiny_config, start, put, known, attention, mesh, documents
):
    cfg = tiny_config(model={"positions": "rope", "kv_heads": 4}, data={"documents": documents})
    split = replace(cfg, compute=replace(cfg.compute, attention=attention))
    rng = np.random.default_rng(0)
    batch = {
        "windows_BW": rng.integers(0, 20, (16, 33), np.int32),
        "lengths_B": rng.integers(1, 33, 16, np.int32),
    }

    def gradients(cfg, **mesh):
        with on_mesh(**mesh):
            params = put(start(cfg.model), cfg.model)
            there = {k: arrays.global_batch(v, 16) for k, v in batch.items()}
            loss = lambda params: objective.next_token_loss(params, cfg, there, 0)[0]
            return jax.device_get(jax.jit(jax.value_and_grad(loss))(params))

    if documents not in known:
        known[documents] = gradients(cfg)
    (loss, grads), (want, expected) = gradients(split, **mesh), known[documents]
    assert loss == pytest.approx(want, rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3, rtol=1e-4), grads, expected
    )


def test_gpu_nodes_are_not_tpu_slices() -> None:
    """XLA numbers them as slices, and fsdp may cross them."""
    gpus = [
        types.SimpleNamespace(platform="gpu", device_kind="H100", slice_index=i // 4, id=i)
        for i in range(8)
    ]
    arranged = arrange(MeshConfig(data=1, fsdp=8), gpus)
    assert arranged.size == 8
    tpus = [types.SimpleNamespace(**{**vars(one), "platform": "tpu"}) for one in gpus]
    with pytest.raises(ConfigError, match="the 2 slices lie along it"):
        arrange(MeshConfig(data=1, fsdp=8), tpus)
