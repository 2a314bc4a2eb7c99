"""Adapters and frozen parameters: what is added, what learns, what keeps its bits."""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from gptjax.checkpoint.checkpointer import Checkpointer, leaves_by_path
from gptjax.config import (
    CheckpointConfig,
    ComputeConfig,
    LoraConfig,
    MoeConfig,
    TuneConfig,
    lora_problems,
    tune_problems,
)
from gptjax.errors import ConfigError, MismatchError
from gptjax.finetune import lora
from gptjax.finetune.adapter_checkpoint import AdapterCheckpointer
from gptjax.model import decoder
from gptjax.parallel import arrays, sharding
from gptjax.training import objective, param_groups
from gptjax.training.step import compile_step, state_from_params

pytestmark = pytest.mark.usefixtures("quick_compile")

EVERY = ("blocks/.*/attn/[qkvo]", "blocks/.*/mlp/.*")
RANK4 = LoraConfig(rank=4, alpha=6.0, targets=("blocks/.*/attn/[qkvo]", "blocks/.*/mlp/(up|down)"))


@pytest.fixture
def tiny(tiny_config):
    """Learning fast enough to see, with clipping that would see a frozen gradient."""
    return lambda **sections: tiny_config(
        **{"optim": {"lr": 1e-2, "clip": 0.1, "lr_schedule": "constant"}} | sections
    )


def drawn(tree, seed=1, std=0.1):
    """The same tree of other numbers, b's not zero."""
    rng = np.random.default_rng(seed)
    draw = lambda x: jax.device_put(np.float32(rng.normal(0, std, x.shape)), x.sharding)
    return jax.tree.map(draw, tree)


def fresh(params, cfg, init=lora.init):
    return jax.jit(lambda p: init(p, cfg, jax.random.key(7)))(params)


def trained(cfg, params, loss_fn, lr_multipliers, steps=3):
    """The state after some steps of random windows, and each step's (loss, gradient norm)."""
    state = jax.jit(lambda p: state_from_params(cfg, p, lr_multipliers))(params)
    step = compile_step(cfg, loss_fn, state, objective.abstract_batch(cfg), lr_multipliers)
    return stepped(cfg, step, state, range(steps))


def stepped(cfg, step, state, numbers):
    seen = []
    for at in numbers:
        state, metrics = step(state, batch_of(cfg, at))
        seen.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return state, seen


def batch_of(cfg, at):
    rows, length = cfg.train.batch, cfg.train.seq_len
    windows = np.random.default_rng(at).integers(1, 128, (rows, length + 1), dtype=np.int32)
    batch = {"windows_BW": windows, "lengths_B": np.full(rows, length, np.int32)}
    return arrays.global_batch(batch, rows)


def loss_of(cfg):
    return objective.training_loss(cfg, 0)


# --- adapters ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture(tiny_model):
    return tiny_model(
        activation="swiglu", linear_bias=False, moe=MoeConfig(experts=4, shared=1, hidden=16)
    )


def test_adapters_have_the_shapes_of_their_weights_sides(on_mesh, mixture, random_params):
    with on_mesh():
        cfg, params = LoraConfig(rank=3, targets=EVERY), random_params(mixture)
        adapters = jax.eval_shape(lambda: lora.init(params, cfg, jax.random.key(0)))
    layer = {path: tuple(x.shape) for path, x in leaves_by_path(adapters).items()}
    of = lambda name: tuple(layer[f"blocks/layer_0/{name}/{half}"] for half in "ab")
    assert of("attn/q") == ((2, 32, 3), (2, 3, 8, 4))
    assert of("attn/o") == ((2, 8, 4, 3), (2, 3, 32))
    assert of("mlp/gate") == ((2, 4, 32, 3), (2, 4, 3, 16))
    assert of("mlp/down") == ((2, 4, 16, 3), (2, 4, 3, 32))
    assert of("mlp/router") == ((2, 32, 3), (2, 3, 4))
    assert of("mlp/shared_down") == ((2, 16, 3), (2, 3, 32))


def test_fresh_adapters_add_nothing_and_a_is_uniform_up_to_its_bound(
    on_mesh, tiny_model, random_params
):
    with on_mesh():
        params = random_params(tiny_model())
        cfg = LoraConfig(rank=64, targets=("blocks/.*/attn/(q|o)", "blocks/.*/mlp/down"))
        adapters = fresh(params, cfg)
        merged = jax.jit(lambda p, a: lora.merge_adapters(p, a, cfg))(params, adapters)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, merged))
    for path, inputs in (("attn/q", 32), ("attn/o", 32), ("mlp/down", 128)):
        a = np.asarray(leaves_by_path(adapters)[f"blocks/layer_0/{path}/a"])
        bound = 1 / math.sqrt(inputs)
        assert 0.99 * bound < np.abs(a).max() < bound
        assert np.abs(a).mean() == pytest.approx(bound / 2, rel=0.05)
        assert abs(a.mean()) < 0.05 * bound
    attn = jax.device_get(adapters)["blocks"]["layer_0"]["attn"]
    q, o = (attn[name]["a"].ravel()[:9] for name in "qo")
    assert not np.allclose(q, o)


def test_an_adapters_numbers_are_its_own_whatever_else_has_one(on_mesh, tiny_model, random_params):
    with on_mesh():
        params = random_params(tiny_model())
        few, many = (
            fresh(params, LoraConfig(rank=2, targets=t)) for t in (("blocks/.*/attn/q",), EVERY[:1])
        )
    assert set(few["blocks"]["layer_0"]["attn"]) == {"q"}
    q = [tree["blocks"]["layer_0"]["attn"]["q"]["a"] for tree in (few, many)]
    np.testing.assert_array_equal(*q)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 4), (True, 6 / 2)])
def test_merging_adds_the_scaled_product_of_the_two_halves(
    on_mesh, mixture, random_params, rslora, scale
):
    cfg = LoraConfig(rank=4, alpha=6.0, rslora=rslora, targets=EVERY)
    with on_mesh():
        params = random_params(mixture)
        adapters = drawn(fresh(params, cfg))
        merged = jax.device_get(
            jax.jit(lambda p, a: lora.merge_adapters(p, a, cfg))(params, adapters)
        )
    w, new, halves = (jax.device_get(leaves_by_path(t)) for t in (params, merged, adapters))
    changed = {path for path in w if not np.array_equal(w[path], new[path])}
    assert changed == {path.rpartition("/")[0] for path in halves}
    for name, formula in {
        "attn/q": "ldr,lrhc->ldhc",
        "attn/o": "lhcr,lrd->lhcd",
        "mlp/gate": "ledr,lerf->ledf",
        "mlp/router": "ldr,lre->lde",
    }.items():
        path = f"blocks/layer_0/{name}"
        a, b = (np.float64(halves[f"{path}/{half}"]) for half in "ab")
        want = w[path] + scale * np.einsum(formula, a, b)
        np.testing.assert_allclose(new[path], want, atol=1e-6, err_msg=name)


def test_a_pattern_is_of_the_whole_path_and_one_that_matches_nothing_lists_the_candidates(
    on_mesh, tiny_model, random_params
):
    with on_mesh():
        params = random_params(tiny_model())
    assert lora.targets(params, LoraConfig()) == [f"blocks/layer_0/attn/{n}" for n in "qv"]
    for pattern in ("q", "blocks/.*/attn/q_bias", "embed"):
        with pytest.raises(
            ConfigError, match=f"finetune.lora.targets={pattern}: matches none of"
        ) as error:
            lora.targets(params, LoraConfig(targets=(pattern,)))
        listed = error.value.problems[0]
        assert "blocks/layer_0/mlp/down" in listed
        assert "bias" not in listed.split("none of")[1]


def test_values_that_make_no_sense_are_told(tiny_model):
    bad = LoraConfig(rank=-1, alpha=0.0, targets=("blocks/(",))
    told = list(lora_problems(bad, "finetune.lora"))
    assert [t.split("=")[0] for t in told] == [
        f"finetune.lora.{name}" for name in ("rank", "alpha", "targets")
    ]
    assert "regular expression" in told[-1]
    bad = TuneConfig(freeze=("(",), freeze_layers=3, layer_decay=0.0)
    told = list(tune_problems(bad, tiny_model(), "finetune"))
    assert [t.split("=")[0] for t in told] == [
        f"finetune.{name}" for name in ("freeze", "freeze_layers", "layer_decay")
    ]
    assert not [*lora_problems(LoraConfig(), ""), *tune_problems(TuneConfig(), tiny_model(), "")]


# --- training ----------------------------------------------------------------------------------


def adapted(loss_fn, cfg):
    return lambda tree, batch, keys_B2: loss_fn(lora.merge(tree, cfg), batch, keys_B2)


def begun(cfg, random_params, adapters=RANK4):
    both = fresh(random_params(cfg.model, 0.1), adapters, lora.with_adapters)
    return both, lora.lr_multipliers(both, TuneConfig(), cfg.model)


def test_adapters_alone_learn_and_have_optimizer_state(on_mesh, tiny, random_params):
    cfg = tiny(train={"ema_decay": 0.9})
    with on_mesh():
        params, lr_multipliers = begun(cfg, random_params)
        before = jax.device_get(params)
        state, seen = trained(cfg, params, adapted(loss_of(cfg), RANK4), lr_multipliers)
        after = jax.device_get(state)
        assert jax.tree.structure(state.averaged) == jax.tree.structure(state.params)
    assert jax.tree.all(jax.tree.map(np.array_equal, before["base"], after.params["base"]))
    moved = jax.tree.map(lambda x, y: not np.array_equal(x, y), before, after.params)
    assert jax.tree.all(moved["adapters"])
    assert len({loss for loss, _ in seen}) == 3
    moments = {path for path, x in leaves_by_path(after.opt_state).items() if x.ndim}
    assert len(moments) == 2 * len(jax.tree.leaves(before["adapters"]))
    assert all("/adapters/" in path for path in moments)
    assert set(after.ema) == {"adapters"}
    learning, total = param_groups.count_trainable(before, lr_multipliers)
    assert learning == sum(x.size for x in jax.tree.leaves(before["adapters"]))
    assert total == sum(x.size for x in jax.tree.leaves(before))


def test_the_first_gradient_is_the_full_ones_product_with_the_other_half(
    on_mesh, tiny, random_params
):
    """dL/db = scale a^T dL/dW, and while b is zero dL/da is zero."""
    cfg = tiny()
    with on_mesh():
        params, lr_multipliers = begun(cfg, random_params)
        batch = batch_of(cfg, 0)
        plain = loss_of(cfg)
        full = jax.jit(jax.grad(lambda p: plain(p, batch, None)[0]))(params["base"])
        over = lambda a, base: adapted(plain, RANK4)(base | {"adapters": a}, batch, None)[0]
        learning, frozen = param_groups.partition(params, lr_multipliers)
        grads = jax.jit(jax.grad(over))(learning["adapters"], frozen)
    full, grads, halves = (
        jax.device_get(leaves_by_path(t)) for t in (full, grads, params["adapters"])
    )
    assert all((g == 0).all() for path, g in grads.items() if path.endswith("/a"))
    for name, formula in {"attn/q": "ldr,ldhc->lrhc", "mlp/down": "lfr,lfd->lrd"}.items():
        path = f"blocks/layer_0/{name}"
        want = 1.5 * np.einsum(formula, np.float64(halves[f"{path}/a"]), np.float64(full[path]))
        np.testing.assert_allclose(grads[f"{path}/b"], want, rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_adapters_on_eight_devices_train_as_on_one(on_mesh, tiny, random_params):
    cfg = tiny(train={"accumulation": 2})

    def run(*sizes):
        with on_mesh(*sizes):
            both, lr_multipliers = begun(cfg, random_params)
            begin = jax.device_get(both["adapters"])
            q = both["adapters"]["blocks"]["layer_0"]["attn"]["q"]
            parts = [len({str(s.index) for s in x.addressable_shards}) for x in (q["a"], q["b"])]
            state, seen = trained(cfg, both, adapted(loss_of(cfg), RANK4), lr_multipliers)
            assert state.params["adapters"]["blocks"]["layer_0"]["attn"]["q"]["a"].sharding == (
                q["a"].sharding
            )
            return begin, parts, seen, jax.device_get(state.params)

    one, eight = run(1, 1, 1), run(2, 2, 2)
    assert jax.tree.all(jax.tree.map(np.array_equal, one[0], eight[0]))
    assert one[1] == [1, 1]
    assert eight[1] == [2, 2]  # a over fsdp, b over tensor
    np.testing.assert_allclose(eight[2], one[2], rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(y, x, atol=1e-4), one[3], eight[3])


@pytest.mark.slow
def test_experts_adapters_on_a_mesh_train_as_on_one(on_mesh, tiny, mixture, random_params):
    cfg = replace(tiny(), model=mixture)
    targets = LoraConfig(rank=2, targets=EVERY)

    def run(**sizes):
        with on_mesh(**sizes):
            both, lr_multipliers = begun(cfg, random_params, targets)
            return trained(cfg, both, adapted(loss_of(cfg), targets), lr_multipliers, steps=2)[1]

    np.testing.assert_allclose(run(expert=2, tensor=2, fsdp=2), run(), rtol=1e-5)


# --- freezing ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_frozen_keeps_its_bits_and_has_no_state(on_mesh, tiny, random_params):
    """Also where Adam without eps makes 0/0 of a gradient that is zero."""
    cfg = tiny(
        model={"layers": 4, "pattern": ("full", "window"), "window": 9, "linear_bias": False},
        optim={"lr": 1e-2, "lr_schedule": "constant", "eps": 0.0},
        train={"ema_decay": 0.9},
    )
    tune = TuneConfig(freeze=("embed", "blocks/layer_1/mlp/.*"), freeze_layers=3, layer_decay=0.5)
    with on_mesh():
        params = random_params(cfg.model, 0.1)
        params["blocks"]["layer_0"]["norm_mlp"]["bias"] *= -0.0  # whose sign a sum with 0 loses
        lr_multipliers = param_groups.lr_multipliers(params, tune, cfg.model)
        before = jax.device_get(params)
        state, _ = trained(cfg, params, loss_of(cfg), lr_multipliers)
        after = jax.device_get(state)
    bits = lambda x: np.asarray(x).view(np.uint32)
    averaged = leaves_by_path(after.averaged)
    for path, now in leaves_by_path(after.params).items():
        old = leaves_by_path(before)[path]
        if path == "embed" or path.startswith(("blocks/layer_0", "blocks/layer_1/mlp")):
            rows, moves = slice(None), False  # layers 0 and 2 are below the third
        elif path.startswith("blocks/layer_1"):
            rows, moves = slice(1), True  # layers 1 and 3
            assert not np.array_equal(old[1], now[1]), path
        else:
            rows, moves = slice(0), True
        np.testing.assert_array_equal(bits(now[rows]), bits(old[rows]), err_msg=path)
        np.testing.assert_array_equal(bits(averaged[path][rows]), bits(old[rows]), err_msg=path)
        assert np.array_equal(old, now) != moves, path
        assert np.isfinite(now).all(), path
    states = {path.split("/mu/")[1] for path in leaves_by_path(after.opt_state) if "/mu/" in path}
    assert states == set(leaves_by_path(after.ema))
    assert not [
        p for p in states if p.startswith(("embed", "blocks/layer_0", "blocks/layer_1/mlp"))
    ]


@pytest.mark.slow
def test_a_frozen_layer_counts_neither_for_clipping_nor_for_the_gradients_norm(
    on_mesh, tiny, random_params
):
    """The gradients' norm is that of the layers that learn, by hand."""
    cfg = tiny()
    tune = TuneConfig(freeze=("embed", "positions", "norm_final/.*"), freeze_layers=1)
    with on_mesh():
        params = random_params(cfg.model, 0.1)
        lr_multipliers = param_groups.lr_multipliers(params, tune, cfg.model)
        batch = batch_of(cfg, 0)
        full = jax.jit(jax.grad(lambda p: loss_of(cfg)(p, batch, None)[0] / 512))(params)
        _, ((_, norm),) = trained(cfg, params, loss_of(cfg), lr_multipliers, steps=1)
    upper = [np.asarray(g)[1] for g in jax.tree.leaves(full["blocks"])]
    assert norm == pytest.approx(np.sqrt(sum((g**2).sum() for g in upper)), rel=1e-4)
    assert norm > cfg.optim.clip


@pytest.mark.exhaustive
@pytest.mark.slow
def test_frozen_and_slowed_layers_on_eight_devices_train_as_on_one(on_mesh, tiny, random_params):
    # Adam's eps is above the rounding of gradients near zero, which it would otherwise blow up to
    # whole steps.
    optim = {"lr": 1e-2, "clip": 0.1, "lr_schedule": "constant", "eps": 1e-4}
    cfg = tiny(model={"layers": 4}, optim=optim)
    tune = TuneConfig(freeze=("positions",), freeze_layers=1, layer_decay=0.7)

    def run(**sizes):
        with on_mesh(**sizes):
            params = random_params(cfg.model, 0.1)
            lr_multipliers = param_groups.lr_multipliers(params, tune, cfg.model)
            state, seen = trained(cfg, params, loss_of(cfg), lr_multipliers)
            return seen, jax.device_get(state.params)

    one, eight = run(), run(stage=2, fsdp=2, tensor=2)
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(y, x, atol=1e-5), one[1], eight[1])


def test_patterns_that_match_nothing_and_nothing_left_are_refused(
    on_mesh, tiny_model, random_params
):
    model = tiny_model()
    with on_mesh():
        params = random_params(model)
    with pytest.raises(ConfigError, match=r"finetune.freeze=head: matches none of .*positions"):
        param_groups.lr_multipliers(params, TuneConfig(freeze=("head", "embed")), model)
    with pytest.raises(ConfigError, match="nothing is left to train"):
        param_groups.lr_multipliers(params, TuneConfig(freeze=(".*",)), model)
    learning, total = param_groups.count_trainable(
        params,
        param_groups.lr_multipliers(params, TuneConfig(freeze=("[^b].*",), freeze_layers=1), model),
    )
    blocks = sum(x.size for x in jax.tree.leaves(params["blocks"]))
    assert (learning, total) == (blocks // 2, sum(x.size for x in jax.tree.leaves(params)))


# --- resume ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_resumed_run_is_the_run_that_was_never_interrupted(
    on_mesh, tiny, random_params, tmp_path
):
    cfg = tiny(train={"ema_decay": 0.9})
    tune = TuneConfig(freeze=(".*/mlp/.*/a",), freeze_layers=1)
    with on_mesh(1, 2, 2):
        both, _ = begun(cfg, random_params)
        lr_multipliers = lora.lr_multipliers(both, tune, cfg.model)
        frozen = jax.device_get(param_groups.partition(both, lr_multipliers)[1])
        layout = jax.tree.map(lambda x: x.sharding, param_groups.partition(both, lr_multipliers)[1])
        kinds = {
            "whole": lambda: Checkpointer(tmp_path / "whole", CheckpointConfig()),
            "separate": lambda: AdapterCheckpointer(
                tmp_path / "separate",
                CheckpointConfig(),
                lr_multipliers=lr_multipliers,
                frozen=lambda: jax.device_put(frozen, layout),
            ),
        }
        state = jax.jit(lambda p: state_from_params(cfg, p, lr_multipliers))(both)
        loss_fn = adapted(loss_of(cfg), RANK4)
        step = compile_step(cfg, loss_fn, state, objective.abstract_batch(cfg), lr_multipliers)
        half, _ = stepped(cfg, step, state, range(2))
        saved = {}
        for kind, checkpoints in kinds.items():
            with checkpoints() as one:
                one.save(2, half)
                one.finish()
                saved[kind] = one.meta(2)["tree"]
        through, seen = stepped(cfg, step, half, range(2, 4))
        through = jax.device_get(through)
        abstract = sharding.abstract(
            lambda: state_from_params(cfg, fresh_abstract(cfg), lr_multipliers)
        )
        for checkpoints in kinds.values():
            restored = checkpoints().restore_newest(abstract)
            again, seen_again = stepped(cfg, step, restored, range(2, 4))
            assert seen == seen_again
            assert jax.tree.structure(through) == jax.tree.structure(again)
            assert jax.tree.all(jax.tree.map(np.array_equal, through, jax.device_get(again)))
    learning = {path for path in saved["separate"] if path.startswith("params/")}
    assert all(path.startswith("params/adapters/") for path in learning)
    assert not any("/mlp/" in path and path.endswith("/a") for path in learning)
    assert {p for p in saved["whole"] if p.startswith("params/")} > learning
    assert saved["whole"].keys() - saved["separate"].keys() == {
        f"params/{path}" for path in leaves_by_path(frozen)
    }


def fresh_abstract(cfg):
    params = decoder.init(cfg.model, jax.random.key(0))
    return lora.with_adapters(params, RANK4, jax.random.key(7))


@pytest.mark.slow
def test_separate_checkpoints_are_not_restored_beside_another_base(
    on_mesh, tiny, random_params, tmp_path
):
    cfg = tiny()
    with on_mesh():
        both, lr_multipliers = begun(cfg, random_params)
        state = state_from_params(cfg, both, lr_multipliers)
        make = lambda frozen: AdapterCheckpointer(
            tmp_path, CheckpointConfig(), lr_multipliers=lr_multipliers, frozen=lambda: frozen
        )
        frozen = param_groups.partition(both, lr_multipliers)[1]
        with make(frozen) as one:
            one.save(1, state)
            one.finish()
        other = jax.tree.map(lambda x: x + 1, frozen)
        with pytest.raises(MismatchError, match="beside other frozen parameters"):
            make(other).restore_newest(state)
        assert make(frozen).restore_newest(state) is not None


# --- merged ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_merged_models_logits_are_those_of_separate_adapters(on_mesh, tiny, random_params):
    """In the step the sum is made on a mesh, merged on one device: the logits are alike."""
    cfg = tiny()
    tokens = np.random.default_rng(0).integers(0, 128, (8, 32)).astype(np.int32)

    def logits(params, tokens_BT):
        x_ND = decoder.apply(params, cfg.model, ComputeConfig(), tokens_BT).x_ND
        return decoder.logits(params, cfg.model, x_ND)

    with on_mesh():
        both, _ = begun(cfg, random_params)
        both["adapters"] = drawn(both["adapters"])
        plain = jax.device_get(jax.jit(lambda p: lora.merge(p, RANK4))(both))
        rows = arrays.global_batch(tokens, 8)
        want, base = (jax.device_get(jax.jit(logits)(p, rows)) for p in (plain, both["base"]))
        host = jax.device_get(both)
    with on_mesh(2, 2, 2):
        both, _ = begun(cfg, random_params)
        both = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), host, both)
        whole = jax.jit(lambda p, rows: logits(lora.merge(p, RANK4), rows))
        got = jax.device_get(whole(both, arrays.global_batch(tokens, 8)))
    assert np.abs(base - want).max() > 0.1
    np.testing.assert_allclose(got, want, atol=1e-5)
