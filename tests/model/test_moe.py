"""The router, grouped products, and dispatch with and without a capacity."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoint.checkpointer import leaves_by_path
from gptjax.config import MoeConfig
from gptjax.model import decoder, moe
from gptjax.parallel import arrays, matmul, sharding
from gptjax.training import objective

pytestmark = pytest.mark.usefixtures("quick_compile")

ROWS, T = 8, 32
FIELDS = {"activation": "swiglu", "linear_bias": False}


def mixture(tiny_config, **fields):
    given = {"experts": 4, "top_k": 2, "hidden": 48} | fields
    return tiny_config(model=FIELDS | {"moe": MoeConfig(**given)})


def batch(cfg):
    windows = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (ROWS, T + 1), np.int32)
    local = {"windows_BW": windows, "lengths_B": np.full(ROWS, T, np.int32)}
    return arrays.global_batch(local, ROWS)


def loss_sums_and_grads(cfg, params, training=True):
    run = jax.value_and_grad(
        lambda p, b: objective.next_token_loss(p, cfg, b, 0, training=training), has_aux=True
    )
    (total, sums), grads = jax.device_get(jax.jit(run)(params, batch(cfg)))
    return {"total": total, **sums}, leaves_by_path(grads)


# --- products over groups ----------------------------------------------------------------------


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Grouped products by the GPU's program."""
    monkeypatch.setattr(sharding, "platform", lambda: "gpu")
    monkeypatch.setattr(moe, "_FEW_ROWS", 0)
    monkeypatch.setattr(moe, "_LARGEST_BLOCK", 2)


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize(
    "sizes", [[5, 0, 7, 3], [0, 0, 0, 15], [1, 1, 1, 1], [0, 0, 0, 0], [15, 0, 0, 0], [4, 4, 4, 3]]
)
def test_grouped_product_multiplies_each_groups_rows_by_its_matrix(
    on_mesh, request, sizes, platform
):
    if platform == "gpu":
        request.getfixturevalue("as_on_a_gpu")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(15, 6)).astype(np.float32)
    w = rng.normal(size=(4, 6, 5)).astype(np.float32)
    groups = np.repeat(range(4), sizes)
    want = np.zeros((15, 5), np.float32)
    for row, group in enumerate(groups):
        want[row] = x[row] @ w[group]

    def run(x, w):
        return moe.grouped_product(x, w, jnp.asarray(sizes, jnp.int32))

    with on_mesh():
        got, pull = jax.vjp(jax.jit(run), x, w)
        dx, dw = pull(jnp.ones_like(got))
    np.testing.assert_allclose(got, want, atol=1e-5)
    want_dw = np.stack(
        [x[: len(groups)][groups == g].sum(0)[:, None] * np.ones(5) for g in range(4)]
    )
    np.testing.assert_allclose(dw, want_dw, atol=1e-5)
    np.testing.assert_allclose(dx[: len(groups)], w.sum(-1)[groups], atol=1e-5)
    assert not dx[len(groups) :].any()


def test_grouped_product_equals_ragged_dot(on_mesh, monkeypatch):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((64, 8), (5, 8, 6)))
    sizes = jnp.asarray([20, 0, 3, 30, 1])
    with on_mesh():
        here = moe.grouped_product(x, w, sizes)
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    there = jax.jit(moe.grouped_product)(x, w, sizes)
    np.testing.assert_allclose(there, here, atol=1e-5)


@pytest.mark.slow
def test_a_mixture_by_the_products_of_a_gpu_has_the_loss_and_gradients_of_the_cpus(
    tiny_config, on_mesh, random_params, request
):
    cfg = mixture(tiny_config)
    found = {}
    for platform in ("cpu", "gpu"):
        if platform == "gpu":
            request.getfixturevalue("as_on_a_gpu")
        with on_mesh(fsdp=2, tensor=2, expert=2):
            found[platform] = loss_sums_and_grads(cfg, random_params(cfg.model))
    (sums, grads), (want_sums, want_grads) = found["gpu"], found["cpu"]
    assert sums["total"] == pytest.approx(want_sums["total"], rel=1e-6)
    for path, grad in grads.items():
        want = want_grads[path]
        atol = 1e-5 * np.abs(want).max()
        np.testing.assert_allclose(grad, want, rtol=1e-4, atol=atol, err_msg=path)


# --- routing -----------------------------------------------------------------------------------


def routed(tiny_config, on_mesh, logits, **fields):
    cfg = mixture(tiny_config, experts=logits.shape[1], **fields).model
    with on_mesh():
        rows = jax.device_put(logits, jax.NamedSharding(jax.sharding.get_mesh(), jax.P(None, None)))
        return jax.device_get(jax.jit(lambda x: moe.route(cfg, x, 1))(rows))


def test_balance_loss_is_one_for_even_routing_and_largest_for_one_expert(tiny_config, on_mesh):
    even = np.float32(np.tile(20 * np.eye(4), (8, 1)))
    ids, weights, routing = routed(tiny_config, on_mesh, even, top_k=1)
    assert (ids[:, 0] == np.tile(range(4), 8)).all()
    np.testing.assert_allclose(weights, 1.0)
    assert routing.balance / 32 == pytest.approx(1.0)
    np.testing.assert_allclose(routing.load_E / 32, 1.0)
    one = np.float32(np.tile([20.0, 0, 0, 0], (32, 1)))
    _, _, routing = routed(tiny_config, on_mesh, one, top_k=1)
    assert routing.balance / 32 == pytest.approx(4.0, rel=1e-4)
    np.testing.assert_allclose(routing.load_E / 32, [4, 0, 0, 0])
    assert routing.router_z / 32 == pytest.approx(20.0**2, rel=1e-3)


@pytest.mark.parametrize("normalize", [True, False])
def test_router_weights_are_normalised_over_the_chosen_or_over_all_experts(
    tiny_config, on_mesh, normalize
):
    logits = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
    ids, weights, _ = routed(tiny_config, on_mesh, logits, top_k=3, normalize=normalize)
    e = np.exp(logits)
    share = e / e.sum(-1, keepdims=True)
    want = np.take_along_axis(share, ids, 1)
    if normalize:
        want = want / want.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, want, rtol=1e-5)
    assert (np.sort(ids, 1) == np.sort(np.argsort(-logits, 1)[:, :3], 1)).all()


# --- on meshes, and with a capacity -------------------------------------------------------------


@pytest.fixture(scope="module", params=[0.0, pytest.param(1.0, marks=pytest.mark.slow)])
def on_one_device(request, on_mesh, tiny_config, random_params):
    """A mixture with this capacity, its sums and gradients on one device."""
    cfg = mixture(tiny_config, capacity=request.param, shared=1)
    with on_mesh():
        return cfg, *loss_sums_and_grads(cfg, random_params(cfg.model))


@pytest.mark.parametrize(
    "mesh",
    [
        (1, 2, 2, 2),
        *(pytest.param(m, marks=pytest.mark.exhaustive) for m in ((8, 1, 1, 1), (1, 2, 1, 4))),
    ],
)
@pytest.mark.slow
def test_every_mesh_has_the_loss_routing_and_gradients_of_one_device(
    on_mesh, random_params, on_one_device, mesh
):
    cfg, one, one_grads = on_one_device
    with on_mesh(*mesh):
        params = random_params(cfg.model)
        shards = params["blocks"]["layer_0"]["mlp"]["gate"].addressable_shards
        assert len({str(s.index) for s in shards}) == mesh[1] * mesh[2] * mesh[3]
        many, many_grads = loss_sums_and_grads(cfg, params)
    for name, value in one.items():
        np.testing.assert_allclose(many[name], value, rtol=1e-5, err_msg=name)
    assert (one["moe_dropped"] > 0) == (cfg.model.moe.capacity > 0)
    for path, g in one_grads.items():
        scale = np.abs(g).max()
        np.testing.assert_allclose(many_grads[path] / scale, g / scale, atol=2e-5, err_msg=path)


@pytest.mark.slow
def test_a_large_capacity_drops_nothing_and_equals_dropless(on_mesh, tiny_config, random_params):
    with on_mesh():
        cfg = mixture(tiny_config)
        params = random_params(cfg.model)
        free, free_grads = loss_sums_and_grads(cfg, params)
        wide, wide_grads = loss_sums_and_grads(mixture(tiny_config, capacity=4.0), params)
    assert wide["moe_dropped"] == 0
    assert wide["loss"] == pytest.approx(free["loss"], rel=1e-6)
    for path, g in free_grads.items():
        scale = np.abs(g).max()
        np.testing.assert_allclose(wide_grads[path] / scale, g / scale, atol=1e-5, err_msg=path)


@pytest.mark.slow
def test_capacity_overflow_drops_second_choices_first(on_mesh, tiny_config, random_params):
    """By hand: in each sequence an expert takes tokens up to its capacity, first choices first."""
    cfg = mixture(tiny_config, capacity=0.75)
    with on_mesh():
        params = random_params(cfg.model)
        sums, _ = loss_sums_and_grads(cfg, params)
        evaluated, _ = loss_sums_and_grads(cfg, params, training=False)
        layer = jax.tree.map(lambda a: a[0], params["blocks"]["layer_0"])["mlp"]
        x = arrays.global_batch(
            np.random.default_rng(1).normal(size=(ROWS * T, 32)).astype(np.float32), ROWS * T
        )

        @functools.partial(jax.jit, static_argnums=2)
        def run(params, x, training):
            layer = moe.MoE(cfg.model, training, matmul.layout_of(x))
            return layer.apply({"params": params}, x, ROWS)

        (y, routing), (free, _) = (jax.device_get(run(layer, x, mode)) for mode in (True, False))
        layer, x = jax.device_get((layer, x))
    assert evaluated["moe_dropped"] == 0
    assert 0 < sums["moe_dropped"] / sums["targets"] < 0.5

    places = -(-int(0.75 * 2 * T) // 4)
    e = np.exp(np.float64(x) @ layer["router"])
    share = e / e.sum(-1, keepdims=True)
    chosen = np.argsort(-share, 1)[:, :2]
    dropped, want = 0, np.zeros_like(y)
    for row in range(ROWS):
        taken = dict.fromkeys(range(4), 0)
        for choice in range(2):
            for t in range(row * T, (row + 1) * T):
                expert = chosen[t, choice]
                taken[expert] += 1
                if taken[expert] > places:
                    dropped += 1
                    continue
                gate, up = x[t] @ layer["gate"][expert], x[t] @ layer["up"][expert]
                out = (gate / (1 + np.exp(-gate)) * up) @ layer["down"][expert]
                want[t] += out * share[t, expert] / share[t, chosen[t]].sum()
    assert dropped > 0
    assert routing.dropped * 2 == pytest.approx(dropped)
    np.testing.assert_allclose(y, want, atol=1e-4)
    assert not np.allclose(free, want, atol=1e-2)


@pytest.mark.slow
def test_accumulation_does_not_change_the_routers_losses(on_mesh, tiny_config, random_params):
    """Both are sums over sequences, so those of half batches add up."""
    cfg = mixture(tiny_config, capacity=1.0)
    with on_mesh():
        params = random_params(cfg.model)
        whole = batch(cfg)
        run = jax.jit(lambda p, b: objective.next_token_loss(p, cfg, b, 0, training=True)[1])
        together = jax.device_get(run(params, whole))
        halves = [
            jax.device_get(run(params, jax.tree.map(lambda a, h=h: a[4 * h : 4 * h + 4], whole)))
            for h in range(2)
        ]
    for name, value in together.items():
        np.testing.assert_allclose(halves[0][name] + halves[1][name], value, rtol=1e-5)


@pytest.mark.slow
def test_training_on_the_balance_loss_balances_the_experts(on_mesh, tiny_config, random_params):
    cfg = mixture(tiny_config, balance_loss=1.0, router_z_loss=0.0)
    cfg = replace(cfg, model=replace(cfg.model, layers=1))
    with on_mesh():
        params = random_params(cfg.model)
        data = batch(cfg)
        tilted = params["blocks"]["layer_0"]["mlp"]["router"].at[..., 0].add(0.5)
        params["blocks"]["layer_0"]["mlp"]["router"] = tilted

        @jax.jit
        def step(params):
            def balance(p):
                sums = objective.next_token_loss(p, cfg, data, 0, training=True)[1]
                return sums["moe_balance"] / sums["targets"]

            value, g = jax.value_and_grad(balance)(params)
            return value, jax.tree.map(lambda p, g: p - 0.3 * g, params, g)

        values = []
        for _ in range(30):
            value, params = step(params)
            values.append(float(value))
    assert values[0] > 1.2
    assert values[-1] < 1.05


def test_decoding_a_mixture_equals_its_forward_pass(on_mesh, tiny_config, random_params):
    """Token by token through the cache, though the capacity of training would drop some."""
    cfg = mixture(tiny_config, capacity=0.5).model
    compute = tiny_config().compute
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 9), np.int32)
    with on_mesh():
        params = random_params(cfg)
        place = lambda a: arrays.global_batch(np.asarray(a, np.int32), 2)
        whole = jax.jit(lambda t: decoder.apply(params, cfg, compute, t).x_ND)(place(tokens))
        step = jax.jit(lambda t, at, cache: decoder.decode(params, cfg, compute, t, at, cache))
        cache = decoder.empty_caches(cfg, 2, 9, "float32")
        for t in range(9):
            x, cache = step(place(tokens[:, t : t + 1]), place(np.full((2, 1), t)), cache)
            np.testing.assert_allclose(x, np.asarray(whole).reshape(2, 9, -1)[:, t], atol=2e-5)
