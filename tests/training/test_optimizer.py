"""Schedules at their corners, decay on matrices alone, clipping, and the same update on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax import param_tree
from gptjax.checkpoint.checkpointer import leaves_by_path
from gptjax.config import MoeConfig, TuneConfig, registry
from gptjax.errors import ConfigError
from gptjax.model import decoder
from gptjax.parallel import sharding
from gptjax.training import optimizer as optim
from gptjax.training import param_groups
from gptjax.training.lr_schedule import learning_rate

pytestmark = pytest.mark.usefixtures("quick_compile")

OPTIMIZERS = ["adamw", "adafactor", "lion", "muon"]
PEAK, STEPS, BATCH = 1e-2, 100, 512


def rate(tiny_config, step, **fields):
    fields = {"lr": PEAK, "final_lr_ratio": 0.1} | fields
    cfg = tiny_config(optim=fields, train={"tokens": STEPS * BATCH})
    assert cfg.steps == STEPS
    return float(learning_rate(cfg)(jnp.int32(step)))


# --- schedules ---------------------------------------------------------------------------------


def decay_of(shape, steps=20):
    return {"decay_tokens": steps * BATCH if shape == "wsd" else 0}


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd", "constant"])
def test_schedule_without_warmup_starts_at_peak(tiny_config, shape):
    fields = {"lr_schedule": shape} | decay_of(shape)
    assert rate(tiny_config, 0, **fields) == pytest.approx(PEAK)


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd", "inverse_sqrt", "constant"])
def test_warmup_is_linear_and_starts_above_zero(tiny_config, shape):
    fields = {"lr_schedule": shape, "warmup_tokens": 10 * BATCH} | decay_of(shape)
    ramp = [rate(tiny_config, step, **fields) for step in range(11)]
    np.testing.assert_allclose(ramp[:10], PEAK * np.arange(1, 11) / 10, rtol=1e-6)
    assert ramp[10] == pytest.approx(PEAK)


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize(
    ("shape", "middle", "end"),
    [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0), ("wsd", 1.0, 0.1)],
)
def test_schedules_in_the_middle_and_at_the_end(tiny_config, shape, middle, end, warmup):
    fields = {
        "lr_schedule": shape,
        "warmup_tokens": warmup * BATCH,
    } | decay_of(shape)
    half = (STEPS + warmup) // 2
    assert rate(tiny_config, half, **fields) == pytest.approx(PEAK * middle, rel=1e-5)
    assert rate(tiny_config, STEPS, **fields) == pytest.approx(PEAK * end, rel=1e-5)
    assert rate(tiny_config, STEPS + 50, **fields) == pytest.approx(PEAK * end, rel=1e-5)


def test_cosine_and_linear_schedules_differ_at_a_quarter(tiny_config):
    cosine, linear = (rate(tiny_config, 25, lr_schedule=shape) for shape in ("cosine", "linear"))
    assert cosine == pytest.approx(PEAK * (0.1 + 0.9 * (1 + np.cos(np.pi / 4)) / 2), rel=1e-5)
    assert linear == pytest.approx(PEAK * (1 - 0.9 / 4), rel=1e-5)


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize(("shape", "middle"), [("cosine", 0.55), ("linear", 0.55)])
def test_a_decay_of_some_tokens_is_followed_by_a_constant_rate(tiny_config, shape, middle, warmup):
    fields = {"lr_schedule": shape, "warmup_tokens": warmup * BATCH, "decay_tokens": 40 * BATCH}
    at = lambda step: rate(tiny_config, warmup + step, **fields) / PEAK
    assert at(0) == pytest.approx(1)
    assert at(20) == pytest.approx(middle, rel=1e-5)
    for step in (40, 41, 80, STEPS):
        assert at(step) == pytest.approx(0.1, rel=1e-5)
    assert at(39) > 0.1


def test_inverse_square_root_falls_from_the_end_of_the_warmup(tiny_config):
    fields = {"lr_schedule": "inverse_sqrt", "warmup_tokens": 10 * BATCH}
    for step in (10, 40, 90, STEPS):
        expected = PEAK * np.sqrt(10 / step)
        assert rate(tiny_config, step, **fields) == pytest.approx(expected, rel=1e-5)


def test_inverse_square_root_of_a_warmup_shorter_than_a_step(tiny_config):
    fields = {"lr_schedule": "inverse_sqrt", "warmup_tokens": 1}
    assert [rate(tiny_config, step, **fields) for step in (0, 3)] == pytest.approx([PEAK, PEAK / 2])


def test_a_decay_by_one_minus_the_square_root(tiny_config):
    fields = {"lr_schedule": "wsd", "decay_tokens": 20 * BATCH, "decay_shape": "1-sqrt"}
    fields |= {"final_lr_ratio": 0.0}
    assert rate(tiny_config, 80, **fields) == pytest.approx(PEAK)
    assert rate(tiny_config, 85, **fields) == pytest.approx(PEAK * (1 - np.sqrt(0.25)), rel=1e-5)
    assert rate(tiny_config, STEPS, **fields) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("warmup", [0, 10])
def test_wsd_schedule_is_constant_then_linear(tiny_config, warmup):
    fields = {
        "lr_schedule": "wsd",
        "warmup_tokens": warmup * BATCH,
        "decay_tokens": 20 * BATCH,
    }
    assert rate(tiny_config, 80, **fields) == pytest.approx(PEAK)
    assert rate(tiny_config, 81, **fields) == pytest.approx(PEAK * (1 - 0.9 / 20), rel=1e-5)
    assert rate(tiny_config, 90, **fields) == pytest.approx(PEAK * 0.55, rel=1e-5)


# --- decay and clipping ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_model):
    """Wide enough for adafactor to factor its moments."""
    return tiny_model(embed=128, mlp=256, tied_embeddings=False, vocab_size=256)


@pytest.fixture(scope="module")
def params(on_mesh, model, random_params):
    with on_mesh(1, 1, 1):
        return random_params(model)


def zeros_like(params):
    return jax.tree.map(jnp.zeros_like, params)


MATRICES = {"embed", "positions", "head", "q", "k", "v", "o", "up", "down"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_applies_to_matrices_only(on_mesh, tiny_config, params, name):
    fields = {"name": name, "lr": PEAK, "weight_decay": 0.5, "lr_schedule": "constant"}
    optimizer = optim.make_optimizer(tiny_config(optim=fields))

    def step(params):
        updates, _ = optimizer.update(zeros_like(params), optimizer.init(params), params)
        return optax.apply_updates(params, updates)

    with on_mesh(1, 1, 1):
        after = jax.device_get(leaves_by_path(jax.jit(step)(params)))
    before = jax.device_get(leaves_by_path(params))
    decayed = set()
    for path, x in before.items():
        leaf = path.split("/")[-1]
        if leaf in MATRICES:
            np.testing.assert_allclose(after[path], x * (1 - PEAK * 0.5), rtol=1e-6, err_msg=path)
            decayed.add(leaf)
        else:
            np.testing.assert_array_equal(after[path], x, err_msg=path)
    assert decayed == MATRICES
    assert {"scale", "bias", "q_bias", "o_bias", "up_bias"} <= {p.split("/")[-1] for p in before}


@pytest.mark.parametrize(
    ("clip", "norm"),
    [
        (1.0, 1.0),
        pytest.param(0.0, 50.0, marks=pytest.mark.slow),
        pytest.param(100.0, 50.0, marks=pytest.mark.slow),
    ],
)
def test_gradients_are_clipped_by_global_norm(on_mesh, tiny_config, params, clip, norm):
    cfg = tiny_config(optim={"clip": clip, "b1": 0.9})
    optimizer = optim.make_optimizer(cfg)

    def first_moment(params):
        gradient = jax.tree.map(jnp.sin, jax.tree.map(lambda x: 100 * x, params))
        scale = 50 / optim.global_norm(gradient)
        gradient = jax.tree.map(lambda g: g * scale, gradient)
        _, state = optimizer.update(gradient, optimizer.init(params), params)
        return gradient, optax.tree.get(state, "mu")

    with on_mesh(1, 1, 1):
        gradient, mu = jax.jit(first_moment)(params)
        assert float(optim.global_norm(gradient)) == pytest.approx(50, rel=1e-5)
        assert float(optim.global_norm(mu)) / 0.1 == pytest.approx(norm, rel=1e-5)
    for g, m in zip(jax.tree.leaves(gradient), jax.tree.leaves(mu), strict=True):
        np.testing.assert_allclose(np.asarray(m) / 0.1 * 50 / norm, g, rtol=1e-4, atol=1e-6)


def test_global_norm_of_all_leaves_in_float32():
    tree = {"a": jnp.array([3.0, 0.0]), "b": {"c": jnp.array([[4.0]], jnp.bfloat16)}}
    norm = optim.global_norm(tree)
    assert (float(norm), norm.dtype) == (5.0, jnp.float32)


def test_adamw_against_numpy(on_mesh, tiny_config, params):
    fields = {"lr": PEAK, "lr_schedule": "constant", "clip": 0.0, "weight_decay": 0.0, "b2": 0.95}
    optimizer = optim.make_optimizer(tiny_config(optim=fields))
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(3, *params["positions"].shape)).astype(np.float32)

    def run(params):
        state = optimizer.init(params)
        for g in gradients:
            grads = {**zeros_like(params), "positions": g}
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params["positions"]

    with on_mesh(1, 1, 1):
        got = jax.jit(run)(params)
    x, m, v = np.float64(params["positions"]), 0.0, 0.0
    for t, g in enumerate(np.float64(gradients), 1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        x = x - PEAK * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
    np.testing.assert_allclose(got, x, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_muon_updates_of_block_matrices_are_near_orthogonal(on_mesh, tiny_config, params):
    """Newton-Schulz as Jordan et al. have it brings them between 0.7 and 1.2 of one another."""
    fields = {"name": "muon", "lr": 1.0, "lr_schedule": "constant", "weight_decay": 0.0}
    optimizer = optim.make_optimizer(tiny_config(optim=fields))
    rng = np.random.default_rng(0)
    noise = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    with on_mesh(1, 1, 1):
        gradient = jax.tree.map(noise, params)
        update = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])
        updates = jax.device_get(leaves_by_path(update(gradient, params)))
    for name, shape in {"q": (128, 128), "o": (128, 128), "up": (128, 256)}.items():
        module = "mlp" if name == "up" else "attn"
        for layer in updates[f"blocks/layer_0/{module}/{name}"]:
            values = np.linalg.svd(layer.reshape(shape), compute_uv=False)
            assert values.max() / np.median(values) < 1.7, name
            assert np.sqrt((layer**2).mean()) == pytest.approx(0.2, rel=0.2), name  # as Adam's


@pytest.mark.slow
def test_muon_updates_all_but_block_matrices_as_adamw(on_mesh, tiny_config, params):
    rng = np.random.default_rng(0)
    gradients = [jax.tree.map(lambda x: rng.normal(size=x.shape), params) for _ in range(2)]

    def after(name):
        fields = {"lr": PEAK, "lr_schedule": "constant", "eps": 1e-2}
        optimizer = optim.make_optimizer(tiny_config(optim={"name": name} | fields))

        @jax.jit
        def step(params, state, gradient):
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        with on_mesh(1, 1, 1):
            now, state = params, optimizer.init(params)
            for gradient in gradients:
                now, state = step(now, state, jax.tree.map(jnp.float32, gradient))
            return jax.device_get(leaves_by_path(now))

    muon, adamw = after("muon"), after("adamw")
    for path, x in adamw.items():
        if path.startswith("blocks") and path.split("/")[-1] in MATRICES:
            assert not np.allclose(muon[path], x, atol=1e-4), path
        else:
            np.testing.assert_allclose(muon[path], x, atol=1e-6, err_msg=path)


def test_muon_orthogonalizes_each_expert_and_leaves_router_to_adam(on_mesh, tiny_config):
    mixture = {"activation": "swiglu", "linear_bias": False, "moe": MoeConfig(experts=4, hidden=64)}
    cfg = tiny_config(model=mixture, optim={"name": "muon", "weight_decay": 0.0, "clip": 0.0})
    optimizer, rng = optim.make_optimizer(cfg), np.random.default_rng(0)
    with on_mesh(1, 1, 1):
        shapes = jax.eval_shape(lambda: decoder.init(cfg.model, jax.random.key(0)))
        gradient = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes
        )
        update = jax.jit(lambda g: optimizer.update(g, optimizer.init(g), g)[0])
        updates = jax.device_get(leaves_by_path(update(gradient)))
    gate = updates["blocks/layer_0/mlp/gate"]
    assert gate.shape == (2, 4, 32, 64)
    for matrix in gate.reshape(8, 32, 64):
        values = np.linalg.svd(matrix, compute_uv=False)
        assert values.max() / np.median(values) < 1.7
    router = np.abs(updates["blocks/layer_0/mlp/router"])
    np.testing.assert_allclose(router, router.max(), rtol=1e-3)  # Adam's first step: the sign


# --- declarations --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_is_named_after_its_transforms(tiny_config, params, name):
    optimizer = optim.make_optimizer(tiny_config(optim={"name": name}))
    assert list(jax.eval_shape(optimizer.init, params)) == ["clip", name, "decay", "rate"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_declared_moments_bound_the_size_of_the_state(tiny_config, params, name):
    optimizer = optim.make_optimizer(tiny_config(optim={"name": name}))
    state, rule = jax.eval_shape(optimizer.init, params), registry.OPTIMIZERS[name]()
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree) if leaf.ndim)
    if name in ("adamw", "lion"):
        assert size(state) == rule.moments * size(params)
    elif name == "muon":  # one for the matrices that it orthogonalizes, two for all else
        assert size(params) < size(state) < rule.moments * size(params)
    else:  # a row and a column of each matrix, small parameters in full
        assert size(state) < size(params) / 2


def test_optimizer_registered_from_outside_is_built_under_its_name(
    tiny_config, params, monkeypatch
):
    monkeypatch.setattr(registry.OPTIMIZERS, "_items", dict(registry.OPTIMIZERS._items))

    @registry.OPTIMIZERS.register("momentum")
    class Momentum(optim.UpdateRule):
        moments = 1

        def build(self, cfg):
            return optax.trace(cfg.optim.b1)

    cfg = tiny_config(optim={"name": "momentum"})
    state = jax.eval_shape(optim.make_optimizer(cfg).init, params)
    assert list(state) == ["clip", "momentum", "decay", "rate"]


def test_optimizer_with_state_across_layers_refuses_interleaved_stages(tiny_config):
    compute = {"rounds": 2}
    optim.make_optimizer(tiny_config(optim={"name": "adamw"}, compute=compute))
    with pytest.raises(ConfigError, match=r"compute.rounds=2: not with optim.name=adafactor"):
        optim.make_optimizer(tiny_config(optim={"name": "adafactor"}, compute=compute))


# --- learning-rate multipliers -------------------------------------------------------------------


def test_layer_decay_multiplies_each_layers_update(on_mesh, tiny_config, tiny_model, random_params):
    """Six layers, two to a period; each is compared with the plain update, by hand."""
    model = tiny_model(layers=6, pattern=("full", "window"), window=9, tied_embeddings=False)
    fields = {"lr": PEAK, "lr_schedule": "constant", "weight_decay": 0.5, "clip": 0.0}
    cfg = tiny_config(optim=fields)
    tune = TuneConfig(freeze_layers=1, layer_decay=0.5)
    with on_mesh():
        params = random_params(model)
        rng = np.random.default_rng(0)
        grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
        lr_multipliers = param_groups.lr_multipliers(params, tune, model)

        def updates(lr_multipliers):
            optimizer = optim.make_optimizer(cfg, lr_multipliers)
            step = jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p)[0])
            return jax.device_get(leaves_by_path(step(params, grads)))

        plain, got = updates(None), updates(lr_multipliers)
    of_layer = [0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0]
    for path, update in plain.items():
        assert np.abs(update).max() > 0
        if path.startswith("blocks/"):
            j = int(path.split("/")[1].removeprefix("layer_"))
            for row in range(3):
                want = of_layer[2 * row + j] * update[row]
                np.testing.assert_allclose(got[path][row], want, rtol=1e-6, err_msg=path)
        else:
            want = update * (1 / 64 if path in ("embed", "positions") else 1)
            np.testing.assert_allclose(got[path], want, rtol=1e-6, err_msg=path)


def test_lr_multipliers_fall_from_top_layer_to_frozen_ones(tiny_model):
    params = {"blocks": {"layer_0": {"w": np.zeros((4, 2))}}, "head": np.zeros((2, 2))}
    tune = TuneConfig(freeze_layers=1, layer_decay=0.5)
    found = param_groups.lr_multipliers(params, tune, tiny_model(layers=4))
    assert found == {"blocks/layer_0/w": (0.0, 0.25, 0.5, 1.0), "head": 1.0}


@pytest.mark.parametrize(
    ("path", "ndim", "sides"),
    [
        ("attn/q", 4, ((1,), (2, 3))),
        ("attn/o", 4, ((1, 2), (3,))),
        ("mlp/down", 3, ((1,), (2,))),
        ("mlp/gate", 4, ((2,), (3,))),
        ("attn/o/a", 4, ((1, 2), (3,))),
        ("attn/q/b", 4, ((1,), (2, 3))),
        ("mlp/gate/a", 4, ((2,), (3,))),
    ],
)
def test_sides_of_matrices_and_of_adapter_halves(path, ndim, sides):
    assert param_tree.sides(f"blocks/layer_0/{path}", ndim) == sides


# --- on a mesh ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        name if name == "adafactor" else pytest.param(name, marks=pytest.mark.slow)
        for name in OPTIMIZERS
    ],
)
def test_updates_on_eight_devices_equal_those_on_one(on_mesh, tiny_config, model, params, name):
    cfg = tiny_config(optim={"name": name, "lr": PEAK, "lr_schedule": "constant"})
    host = jax.device_get(params)
    rng = np.random.default_rng(0)
    noise = [jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f4"), host) for _ in range(3)]

    def run(*mesh):
        optimizer = optim.make_optimizer(cfg)

        def step(params, state, gradient):
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        with on_mesh(*mesh):
            abstract = sharding.abstract(lambda: decoder.init(model, jax.random.key(0)))
            layout = jax.tree.map(lambda x: x.sharding, abstract)
            params = jax.device_put(host, layout)
            assert len({str(s.index) for s in params["embed"].addressable_shards}) == min(mesh) ** 2
            state, step = jax.jit(optimizer.init)(params), jax.jit(step)
            for gradient in noise:
                params, state = step(params, state, jax.device_put(gradient, layout))
            for x, s in zip(jax.tree.leaves(params), jax.tree.leaves(layout), strict=True):
                assert x.sharding.is_equivalent_to(s, x.ndim)
            return jax.device_get(leaves_by_path(params))

    one, eight = run(1, 1, 1), run(2, 2, 2)
    for path, x in one.items():
        assert not np.array_equal(x, leaves_by_path(host)[path])
        np.testing.assert_allclose(eight[path], x, atol=1e-5, err_msg=path)
