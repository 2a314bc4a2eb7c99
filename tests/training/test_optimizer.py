"""Schedules at their corners, decay on matrices alone, clipping, and the same update on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax import param_tree
from gptjax.checkpoint.checkpointer import leaves_by_path
from gptjax.config import MoeConfig, TuneConfig
from gptjax.model import decoder
from gptjax.parallel import sharding
from gptjax.training import optimizer as optim
from gptjax.training import param_groups

pytestmark = pytest.mark.usefixtures("quick_compile")

OPTIMIZERS = ["adamw", "adafactor", "lion", "muon"]
PEAK, STEPS, BATCH = 1e-2, 100, 512


def rate(tiny_config, step, **fields):
    fields = {"lr": PEAK, "final_lr_ratio": 0.1} | fields
    cfg = tiny_config(optim=fields, train={"tokens": STEPS * BATCH})
    assert cfg.train.steps == STEPS
    return float(optim.learning_rate(cfg)(jnp.int32(step)))


# --- schedules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd", "constant"])
def test_without_warmup_a_schedule_starts_at_the_peak(tiny_config, shape):
    fields = {"lr_schedule": shape, "decay_tokens": 20 * BATCH}
    assert rate(tiny_config, 0, **fields) == pytest.approx(PEAK)


@pytest.mark.parametrize("shape", ["cosine", "linear", "wsd", "constant"])
def test_warmup_rises_linearly_to_the_peak_and_the_first_step_already_learns(tiny_config, shape):
    fields = {"lr_schedule": shape, "warmup_tokens": 10 * BATCH, "decay_tokens": 20 * BATCH}
    ramp = [rate(tiny_config, step, **fields) for step in range(11)]
    np.testing.assert_allclose(ramp[:10], PEAK * np.arange(1, 11) / 10, rtol=1e-6)
    assert ramp[10] == pytest.approx(PEAK)


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize(
    ("shape", "middle", "end"),
    [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0), ("wsd", 1.0, 0.1)],
)
def test_the_middle_and_the_end_are_what_the_shape_says(tiny_config, shape, middle, end, warmup):
    fields = {
        "lr_schedule": shape,
        "warmup_tokens": warmup * BATCH,
        "decay_tokens": 20 * BATCH,
    }
    half = (STEPS + warmup) // 2
    assert rate(tiny_config, half, **fields) == pytest.approx(PEAK * middle, rel=1e-5)
    assert rate(tiny_config, STEPS, **fields) == pytest.approx(PEAK * end, rel=1e-5)
    assert rate(tiny_config, STEPS + 50, **fields) == pytest.approx(PEAK * end, rel=1e-5)


def test_cosine_and_linear_differ_between_their_corners(tiny_config):
    cosine, linear = (rate(tiny_config, 25, lr_schedule=shape) for shape in ("cosine", "linear"))
    assert cosine == pytest.approx(PEAK * (0.1 + 0.9 * (1 + np.cos(np.pi / 4)) / 2), rel=1e-5)
    assert linear == pytest.approx(PEAK * (1 - 0.9 / 4), rel=1e-5)


@pytest.mark.parametrize("warmup", [0, 10])
def test_wsd_is_flat_until_its_decay_and_linear_in_it(tiny_config, warmup):
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
def test_at_a_zero_gradient_matrices_decay_and_vectors_stay(on_mesh, tiny_config, params, name):
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


@pytest.mark.parametrize(("clip", "norm"), [(1.0, 1.0), (0.0, 50.0), (100.0, 50.0)])
def test_gradients_are_clipped_to_a_norm_of_all_parameters_together(
    on_mesh, tiny_config, params, clip, norm
):
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


def test_global_norm_is_that_of_one_long_vector():
    tree = {"a": jnp.array([3.0, 0.0]), "b": {"c": jnp.array([[4.0]], jnp.bfloat16)}}
    norm = optim.global_norm(tree)
    assert (float(norm), norm.dtype) == (5.0, jnp.float32)


def test_adamw_is_the_formula(on_mesh, tiny_config, params):
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


def test_muon_makes_the_singular_values_of_a_blocks_matrix_alike(on_mesh, tiny_config, params):
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


def test_muon_is_adamw_for_all_but_the_matrices_of_the_blocks(on_mesh, tiny_config, params):
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


def test_muon_takes_each_expert_for_a_matrix_and_leaves_the_router_to_adam(on_mesh, tiny_config):
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


# --- factors ---------------------------------------------------------------------------------


def test_a_layer_learns_at_a_rate_of_its_own_which_the_decay_and_its_height_give(
    on_mesh, tiny_config, tiny_model, random_params
):
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


def test_factors_fall_from_the_top_layer_to_those_that_are_frozen(tiny_model):
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
def test_a_matrix_has_two_sides_of_which_an_adapters_halves_have_one_each(path, ndim, sides):
    assert param_tree.sides(f"blocks/layer_0/{path}", ndim) == sides


# --- on a mesh ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_updates_on_a_mesh_of_eight_are_those_on_one_device(
    on_mesh, tiny_config, model, params, name
):
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
