"""The decoder against NumPy, its ways of execution against each other, and its guarantees."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from gptjax.checkpoint.checkpointer import leaves_by_path
from gptjax.config import ComputeConfig, ModelConfig, MoeConfig, RopeConfig
from gptjax.errors import ConfigError
from gptjax.model import decoder
from gptjax.model.attention import backends
from gptjax.model.attention import layer as attention
from gptjax.model.flops import ModelCost
from gptjax.parallel import arrays, sharding
from gptjax.runtime.hardware import Target
from gptjax.training import objective

pytestmark = pytest.mark.usefixtures("quick_compile")

ROWS = 8
SLOW = pytest.mark.slow  # what tests/test_invariance.py or a like case has in short
VARIANTS = {
    "gpt2": {},
    "gpt1": {"norm_position": "post", "activation": "gelu"},
    "falcon": {
        "residual": "parallel",
        "shared_norm": True,
        "positions": "rope",
        "kv_heads": 2,
        "linear_bias": False,
    },
    "parallel-alibi": {"residual": "parallel", "positions": "alibi", "norm_bias": False},
    "llama": {
        "norm": "rmsnorm",
        "activation": "swiglu",
        "mlp": 48,
        "tied_embeddings": False,
        "positions": "rope",
        "rope": RopeConfig(theta=100.0),
        "kv_heads": 4,
        "linear_bias": False,
    },
    "stretched": {
        "positions": "rope",
        "rope": RopeConfig(
            theta=100.0, fraction=0.5, scaling="low_frequency", factor=4.0, original_context=16
        ),
        "head_dim": 16,
        "qk_norm": True,
    },
    "yarn": {
        "positions": "rope",
        "rope": RopeConfig(
            theta=100.0, scaling="yarn", factor=4.0, original_context=64, beta_fast=2.0
        ),
        "head_dim": 16,
        "attention_soft_cap": 1.5,
        "logit_soft_cap": 3.0,
        "vocab_size": 100,
    },
    "mixture": {
        "activation": "swiglu",
        "linear_bias": False,
        "moe": MoeConfig(experts=4, top_k=2, hidden=48),
    },
    "shared-mixture": {
        "activation": "swiglu",
        "linear_bias": False,
        "pattern": ("full", "full"),
        "residual": "parallel",
        "moe": MoeConfig(experts=6, top_k=3, hidden=16, normalize=False, shared=2),
    },
    "windowed": {"pattern": ("window", "full"), "window": 5, "positions": "none", "head_dim": 6},
}


def windows(cfg, rows=ROWS):
    shape = (rows, cfg.model.context + 1)
    return np.random.default_rng(0).integers(0, cfg.model.vocab_size, shape, np.int32)


def batch_of(cfg):
    """The windows on the ambient mesh."""
    lengths = np.full(ROWS, cfg.model.context, np.int32)
    batch = {"windows_BW": windows(cfg), "lengths_B": lengths}
    return {name: arrays.global_batch(a, ROWS) for name, a in batch.items()}


def lowered_loss(cfg, params, batch, key=None):
    """The mean loss and gradients, not compiled yet."""

    def run(params, batch):
        def mean(params):
            total, sums = objective.next_token_loss(params, cfg, batch, 0, key)
            return total / sums["targets"]

        loss, grads = jax.value_and_grad(mean)(params)
        return loss, leaves_by_path(grads)

    return jax.jit(run).lower(params, batch)


def loss_and_grads(cfg, params, batch, key=None):
    return jax.device_get(lowered_loss(cfg, params, batch, key).compile()(params, batch))


def hidden_states(cfg, params, batch):
    tokens = batch["windows_BW"][:, :-1]
    return jax.jit(lambda p: decoder.apply(p, cfg.model, cfg.compute, tokens)[0])(params)


def assert_same(got, want, tolerance):
    """Losses, and each gradient relative to its largest element."""
    (loss, grads), (want_loss, want_grads) = got, want
    assert loss == pytest.approx(want_loss, rel=tolerance)
    for path, g in want_grads.items():
        # A bias of the keys moves all scores of a query alike: its gradient is rounding alone.
        scale = np.abs(want_grads[path.replace("k_bias", "k")]).max()
        np.testing.assert_allclose(grads[path] / scale, g / scale, atol=tolerance, err_msg=path)


# --- against NumPy ------------------------------------------------------------------------------


def plain_norm(cfg, p, x):
    if cfg.norm == "rmsnorm":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * p["scale"]
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps) * p["scale"]
    return x + p.get("bias", 0)


def plain_frequencies(rope, width):
    """Radians per position, and the factor on sine and cosine."""
    base = rope.theta ** (-np.arange(0, width, 2) / width)
    turns = rope.original_context * base / (2 * np.pi)
    if rope.scaling == "low_frequency":
        low, high = rope.low_freq_factor, rope.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0, 1)
        return keep * base + (1 - keep) * base / rope.factor, 1
    if rope.scaling == "yarn":
        pair = lambda n: np.log(rope.original_context / (2 * np.pi * n)) / np.log(rope.theta)
        low, high = (width / 2 * pair(n) for n in (rope.beta_fast, rope.beta_slow))
        low, high = max(np.floor(low), 0), np.ceil(high)
        assert 0 < low < high < width / 2
        keep = 1 - np.clip((np.arange(len(base)) - low) / (high - low), 0, 1)
        return keep * base + (1 - keep) * base / rope.factor, 0.1 * np.log(rope.factor) + 1
    return base, 1


def plain_rope(x, rope):
    width = int(x.shape[-1] * rope.fraction)
    half = width // 2
    frequencies, factor = plain_frequencies(rope, width)
    angle = np.arange(len(x))[:, None, None] * frequencies
    z = (x[..., :half] + 1j * x[..., half:width]) * np.exp(1j * angle) * factor
    return np.concatenate([z.real, z.imag, x[..., width:]], -1)


def plain_attention(cfg, p, x, window):
    q, k, v = (
        np.einsum("td,dhc->thc", x, p[name]) + p.get(f"{name}_bias", 0) for name in ("q", "k", "v")
    )
    if cfg.qk_norm:
        rms = lambda x: np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps)
        q, k = q / rms(q) * p["q_scale"], k / rms(k) * p["k_scale"]
    if cfg.positions == "rope":
        q, k = plain_rope(q, cfg.rope), plain_rope(k, cfg.rope)
    k, v = (np.repeat(a, cfg.heads // cfg.kv, axis=1) for a in (k, v))
    score = np.einsum("thc,shc->hts", q, k) / np.sqrt(cfg.head)
    if cap := cfg.attention_soft_cap:
        score = cap * np.tanh(score / cap)
    distance = np.arange(len(x))[:, None] - np.arange(len(x))
    if cfg.positions == "alibi":
        score -= 2.0 ** -np.arange(1, cfg.heads + 1)[:, None, None] * distance  # of 8 heads
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    e = np.where(seen, np.exp(score - score.max(-1, keepdims=True)), 0)
    out = np.einsum("hts,shc->thc", e / e.sum(-1, keepdims=True), v)
    return np.einsum("thc,hcd->td", out, p["o"]) + p.get("o_bias", 0)


def plain_mixture(cfg, p, x):
    """Token by token, expert by expert."""
    swiglu = lambda x, gate, up, down: (x @ gate / (1 + np.exp(-x @ gate)) * (x @ up)) @ down
    out = np.zeros_like(x)
    for t, token in enumerate(x):
        e = np.exp(token @ p["router"])
        share = e / e.sum()
        chosen = np.argsort(-share)[: cfg.moe.top_k]
        total = share[chosen].sum() if cfg.moe.normalize else 1
        for i in chosen:
            out[t] += share[i] / total * swiglu(token, p["gate"][i], p["up"][i], p["down"][i])
    if cfg.moe.shared:
        out += swiglu(x, p["shared_gate"], p["shared_up"], p["shared_down"])
    return out


def plain_mlp(cfg, p, x):
    if cfg.moe.experts:
        return plain_mixture(cfg, p, x)
    up = x @ p["up"] + p.get("up_bias", 0)
    if cfg.activation == "swiglu":
        gate = x @ p["gate"] + p.get("gate_bias", 0)
        h = gate / (1 + np.exp(-gate)) * up
    elif cfg.activation == "gelu":
        h = up * (1 + erf(up / np.sqrt(2))) / 2
    else:
        h = up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3))) / 2
    return h @ p["down"] + p.get("down_bias", 0)


def plain_decoder(cfg, params, tokens):
    """Final hidden states of one sequence, [T, D], in float64."""
    params = jax.tree.map(np.float64, params)
    x = params["embed"][tokens]
    if cfg.positions == "learned":
        x = x + params["positions"][: len(tokens)]
    for layer in range(cfg.layers):
        period, j = divmod(layer, len(cfg.pattern))
        p = jax.tree.map(lambda a, i=period: a[i], params["blocks"][f"layer_{j}"])
        window = cfg.window if cfg.pattern[j] == "window" else None
        norm1 = lambda x, p=p: plain_norm(cfg, p["norm_attn"], x)
        norm2 = lambda x, p=p: plain_norm(cfg, p["norm_attn" if cfg.shared_norm else "norm_mlp"], x)
        attend = lambda x, p=p, w=window: plain_attention(cfg, p["attn"], x, w)
        mlp = lambda x, p=p: plain_mlp(cfg, p["mlp"], x)
        if cfg.norm_position == "post":
            x = norm1(x + attend(x))
            x = norm2(x + mlp(x))
        elif cfg.residual == "parallel":
            x = x + attend(norm1(x)) + mlp(norm2(x))
        else:
            x = x + attend(norm1(x))
            x = x + mlp(norm2(x))
    return x if cfg.norm_position == "post" else plain_norm(cfg, params["norm_final"], x)


@pytest.mark.parametrize(
    "name",
    [name if name == "llama" else pytest.param(name, marks=SLOW) for name in VARIANTS],
)
def test_every_variant_equals_numpy_on_one_device_and_on_a_mesh(
    on_mesh, tiny_config, random_params, name
):
    cfg = tiny_config(model=VARIANTS[name])
    one, eight = [], []
    meshes = [(one, (1, 1, 1)), (eight, (2, 2, 2))]
    if cfg.model.moe.experts:
        meshes[1] = (eight, (1, 2, 2, 2))
    for results, mesh in meshes:
        with on_mesh(*mesh):
            params, batch = random_params(cfg.model), batch_of(cfg)
            shards = {str(s.index) for s in params["embed"].addressable_shards}
            assert len(shards) == mesh[1] * mesh[2]
            results += loss_and_grads(cfg, params, batch)
            if results is one:
                hidden = hidden_states(cfg, params, batch)
                logits = jax.jit(decoder.logits, static_argnums=1)
                scores = jax.device_get(logits(params, cfg.model, hidden))
                params, hidden = jax.device_get((params, hidden))
    assert_same(eight, one, tolerance=1e-5)

    plain = plain_decoder(cfg.model, params, windows(cfg)[0, :-1])
    np.testing.assert_allclose(hidden[: len(plain)], plain, atol=2e-5, rtol=2e-5)
    plain_scores = plain @ params["embed" if cfg.model.tied_embeddings else "head"].T
    if cap := cfg.model.logit_soft_cap:
        plain_scores = cap * np.tanh(plain_scores / cap)
    own, added = np.split(scores[: len(plain)], [cfg.model.vocab_size], axis=1)
    np.testing.assert_allclose(own, plain_scores[:, : cfg.model.vocab_size], atol=1e-4, rtol=1e-4)
    assert (added < -1e29).all()


# --- ways of execution against each other -------------------------------------------------------


@pytest.fixture(scope="module")
def baseline(on_mesh, tiny_config, random_params):
    """A windowed model, scanned, and its loss and gradients."""
    cfg = tiny_config(model={"layers": 4, "pattern": ("window", "full"), "window": 5})
    with on_mesh(1, 1, 1):
        params, batch = random_params(cfg.model), batch_of(cfg)
        lowered = lowered_loss(cfg, params, batch)
        return cfg, params, batch, lowered, jax.device_get(lowered.compile()(params, batch))


@pytest.mark.parametrize(
    "compute",
    [
        pytest.param({"scan_layers": False}, marks=pytest.mark.slow),
        pytest.param({"remat": "block"}, marks=pytest.mark.slow),
        pytest.param({"remat": "dots"}, marks=pytest.mark.slow),
        {"remat": "block", "scan_layers": False},
        pytest.param({"attention": "reference"}, marks=pytest.mark.slow),
        pytest.param({"loss_chunks": 4}, marks=pytest.mark.slow),
    ],
    ids=lambda fields: "-".join(f"{k}={v}" for k, v in fields.items()),
)
def test_scan_remat_attention_and_loss_chunks_do_not_change_loss_or_gradients(
    on_mesh, baseline, compute
):
    cfg, params, batch, lowered, want = baseline
    with on_mesh(1, 1, 1):
        other = lowered_loss(replace(cfg, compute=replace(cfg.compute, **compute)), params, batch)
        assert other.as_text() != lowered.as_text()
        got = jax.device_get(other.compile()(params, batch))
    assert_same(got, want, tolerance=1e-5)


def test_scanned_layers_compile_to_a_loop_and_unrolled_layers_do_not(on_mesh, baseline):
    cfg, params, batch, *_ = baseline

    def hlo(**compute):
        compute = replace(cfg.compute, **compute)
        with on_mesh(1, 1, 1):
            tokens = batch["windows_BW"][:, :-1]
            forward = lambda p, t: decoder.apply(p, cfg.model, compute, t)[0]
            return jax.jit(forward).lower(params, tokens).compile().as_text()

    assert " while(" in hlo(scan_layers=True)
    assert " while(" not in hlo(scan_layers=False)


def test_remat_saves_fewer_residuals(on_mesh, baseline):
    cfg, params, batch, *_ = baseline

    def kept(remat):
        compute = replace(cfg.compute, remat=remat)
        tokens = batch["windows_BW"][:, :-1]
        with on_mesh(1, 1, 1):
            total = lambda p: decoder.apply(p, cfg.model, compute, tokens)[0].sum()
            residuals = jax.eval_shape(lambda p: jax.vjp(total, p)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    assert kept("block") < kept("dots") < kept("none")


@pytest.mark.slow
def test_bfloat16_compute_is_near_float32_and_keeps_float32_parameters(on_mesh, baseline):
    cfg, params, batch, _, (loss, grads) = baseline
    with on_mesh(1, 1, 1):
        low = replace(cfg, compute=replace(cfg.compute, dtype="bfloat16"))
        loss16, grads16 = loss_and_grads(low, params, batch)
        hidden, hidden16 = (jax.device_get(hidden_states(c, params, batch)) for c in (cfg, low))
    assert hidden16.dtype == jnp.bfloat16
    assert {g.dtype for g in grads16.values()} == {np.dtype("float32")}
    assert loss16 == pytest.approx(loss, rel=2e-2)
    error = np.float32(hidden16) - hidden
    assert np.sqrt((error**2).mean() / (hidden**2).mean()) < 5e-2
    for path, g in grads.items():
        if path.endswith("k_bias"):  # zero but for rounding: it moves all of a query's scores alike
            continue
        cosine = (g * grads16[path]).sum() / np.linalg.norm(g) / np.linalg.norm(grads16[path])
        assert cosine > 0.97, path


def dropout_keys(seed):
    """A key for each sequence, on the ambient mesh."""
    keys = jax.random.key_data(jax.random.split(jax.random.key(seed), ROWS))
    return jax.device_put(keys, sharding.spec("batch", None))


@SLOW
def test_dropout_is_the_same_on_every_mesh_and_off_without_keys(
    on_mesh, tiny_config, random_params
):
    cfg = tiny_config(model={"dropout": 0.2})
    results = []
    for mesh in ((1, 1, 1), (2, 2, 2), (1, 1, 2, 1, 4)):
        with on_mesh(*mesh):
            params, batch = random_params(cfg.model), batch_of(cfg)
            results.append(loss_and_grads(cfg, params, batch, dropout_keys(5)))
    for other in results[1:]:
        assert_same(other, results[0], tolerance=1e-5)
    with on_mesh(1, 1, 1):
        params, batch = random_params(cfg.model), batch_of(cfg)
        run = jax.jit(lambda p, b, keys: objective.next_token_loss(p, cfg, b, 0, keys)[0])
        keys = None, *map(dropout_keys, (1, 1, 2))
        off, on, again, other = (float(run(params, batch, key)) for key in keys)
        undropped = jax.jit(lambda p, b: objective.next_token_loss(p, tiny_config(), b, 0)[0])
        assert off == float(undropped(params, batch))
    assert on == again
    assert len({off, on, other}) == 3


# --- guarantees ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "positions",
    [
        pytest.param("learned", marks=pytest.mark.slow),
        "rope",
        pytest.param("alibi", marks=pytest.mark.slow),
        pytest.param("none", marks=pytest.mark.slow),
    ],
)
def test_later_tokens_do_not_change_hidden_states_of_earlier_ones(
    on_mesh, tiny_model, random_params, positions
):
    cfg = tiny_model(positions=positions)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 32), np.int32)
    changed = tokens.copy()
    changed[:, 20] = (changed[:, 20] + 1) % cfg.vocab_size
    with on_mesh(1, 1, 1):
        params = random_params(cfg)
        forward = jax.jit(lambda t: decoder.apply(params, cfg, ComputeConfig(), t)[0])
        before, after = (
            np.asarray(forward(arrays.global_batch(t, 2))).reshape(2, 32, -1)
            for t in (tokens, changed)
        )
    np.testing.assert_array_equal(before[:, :20], after[:, :20])
    assert (before[:, 20:] != after[:, 20:]).any(-1).all()


def test_initial_parameters_have_the_standard_deviations_of_gpt2(on_mesh, tiny_model):
    cfg = tiny_model(vocab_size=1024, context=256, embed=128, layers=3)
    with on_mesh(1, 1, 1):
        tree = jax.jit(lambda: decoder.init(cfg, jax.random.key(0)))()
    params = leaves_by_path(jax.device_get(tree))
    for path, x in params.items():
        name = path.split("/")[-1]
        if name == "scale":
            assert (x == 1).all(), path
        elif name.endswith("bias"):
            assert (x == 0).all(), path
        else:
            std = 0.02 / np.sqrt(2 * 3) if name in ("o", "down") else 0.02
            assert x.std() == pytest.approx(std, rel=0.02), path  # 3 sigma of the smallest
            assert abs(x.mean()) < 4 * std / np.sqrt(x.size), path
    attn = {name: params[f"blocks/layer_0/attn/{name}"] for name in ("q", "k", "v")}
    drawn = [x[layer].ravel() for x in attn.values() for layer in range(3)]
    correlation = np.corrcoef(drawn) - np.eye(9)
    assert np.abs(correlation).max() < 0.04  # no two layers or projections share their draws


def test_initial_parameters_differ_by_seed(on_mesh, tiny_model):
    with on_mesh(1, 1, 1):
        init = jax.jit(lambda key: decoder.init(tiny_model(), key)["embed"])
        one, same, other = (np.asarray(init(jax.random.key(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


def test_flops_per_token_equal_a_count_by_hand():
    cfg = ModelConfig(vocab_size=100, layers=2, embed=8, heads=2, context=64)
    # a layer: q, k, v, o 4 * 8 * 8; feed-forward 2 * 8 * 32.  head: 100 * 8.  8 queries see
    # 1 + 2 + ... + 8 = 36 keys, 4.5 each; a key costs 2 * 2 * 8 forward, three times that in all.
    assert ModelCost(cfg).flops_per_token(8) == 6 * (2 * (256 + 512) + 800) + 2 * 4.5 * 3 * 32


def test_flops_per_token_count_grouped_heads_swiglu_and_windows_by_hand():
    cfg = ModelConfig(
        vocab_size=100,
        layers=4,
        embed=8,
        heads=4,
        kv_heads=1,
        head_dim=3,
        mlp=20,
        activation="swiglu",
        pattern=("window", "full"),
        window=3,
    )
    layer = 8 * 12 + 2 * 8 * 3 + 12 * 8 + 3 * 8 * 20
    windowed = (1 + 2 + 3 * 6) / 8
    keys = 2 * windowed + 2 * 4.5
    expected = 6 * (4 * layer + 800) + 12 * 12 * keys
    assert ModelCost(cfg).flops_per_token(8) == pytest.approx(expected, rel=1e-12)
    wide = replace(cfg, window=50)
    full = replace(cfg, pattern=("full",))
    assert ModelCost(wide).flops_per_token(8) == ModelCost(full).flops_per_token(8)


def test_attention_backends_are_chosen_by_exactly_the_features_that_the_model_needs(
    on_mesh, tiny_model
):
    def chosen(compute="auto", segments=False, training=False, context=1, **fields):
        with on_mesh(context=context):
            return decoder.attention_backends(
                tiny_model(head_dim=8, **fields),
                ComputeConfig(attention=compute, dtype="bfloat16"),
                Target("gpu"),
                32,
                segments=segments,
                training=training,
            )

    assert chosen() == ("cudnn",)
    assert chosen(pattern=("full", "window"), window=4, kv_heads=2) == ("cudnn", "cudnn")
    assert chosen(segments=True) == ("cudnn",)
    mixed = {"pattern": ("full", "window"), "window": 4}
    windows = "cudnn" if jax.__version_info__ >= (0, 12) else "reference"
    assert chosen(segments=True, **mixed) == ("cudnn", windows)
    assert chosen(positions="alibi") == ("reference",)
    assert chosen(context=2, segments=True) == ("cudnn_ring",)
    assert chosen(context=2, positions="alibi") == ("ring",)
    assert chosen(context=2, **mixed) == ("cudnn_ring", "ring")
    assert chosen(dropout=0.1) == ("cudnn",)
    assert chosen(dropout=0.1, training=True) == ("reference",)
    with pytest.raises(ConfigError, match="cudnn: does not support dropout"):
        chosen("cudnn", dropout=0.1, training=True)


def test_auto_trains_with_blockwise_on_cpu_and_with_the_reference_under_dropout(
    on_mesh, tiny_config, monkeypatch
):
    asked = []
    attend = backends.attend

    def spy(*args, backend_name):
        asked.append(backend_name)
        return attend(*args, backend_name=backend_name)

    monkeypatch.setattr(attention, "attend", spy)
    for keys, expected in ((None, "blockwise"), (jnp.zeros((ROWS, 2), jnp.uint32), "reference")):
        cfg = tiny_config(model={"dropout": 0.1})
        tokens = jax.ShapeDtypeStruct((ROWS, 32), jnp.int32)
        with on_mesh(1, 1, 1):
            params = jax.eval_shape(lambda c=cfg: decoder.init(c.model, jax.random.key(0)))
            asked.clear()
            jax.eval_shape(
                lambda p, t, c=cfg, k=keys: decoder.apply(p, c.model, c.compute, t, keys_B2=k),
                params,
                tokens,
            )
        assert set(asked) == {expected}
