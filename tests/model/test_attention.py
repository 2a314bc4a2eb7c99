"""Every attention backend against the reference, the features of each, and the choice."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from both_passes import HEAD, assert_same, attend_on, both_passes, make, placed, segments_of

from gptjax.config.registry import ATTENTION_BACKENDS
from gptjax.errors import ConfigError
from gptjax.kernels import cpu
from gptjax.model import blocks, layers
from gptjax.model.attention import reference, vendor
from gptjax.model.attention.backends import Inputs, LocalBackend, Requirements, Sizes, choose
from gptjax.runtime.hardware import Target

pytestmark = pytest.mark.usefixtures("quick_compile")

ON_CPU = "native" if cpu.ready() else "blockwise"


def test_reference_is_the_softmax_of_scaled_products_over_earlier_keys(on_mesh):
    q, k, v, _ = make(9, heads=4, kv_heads=2, batch=1)
    out = attend_on(on_mesh(), (q, k, v, q), "reference")[0]
    q, k, v, out = (np.float64(a[0]) for a in (q, k, v, out))
    for t in range(9):
        for head in range(4):
            score = k[: t + 1, head // 2] @ q[t, head] / np.sqrt(HEAD)
            p = np.exp(score - score.max())
            expected = p / p.sum() @ v[: t + 1, head // 2]
            np.testing.assert_allclose(out[t, head], expected, atol=1e-6)


def blockwise_and_reference(on_mesh, arrays, **features):
    return [attend_on(on_mesh(), arrays, name, **features) for name in ("blockwise", "reference")]


@pytest.mark.parametrize(
    "length",
    [
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(63, marks=pytest.mark.slow),
        pytest.param(64, marks=pytest.mark.slow),
        65,
        pytest.param(200, marks=pytest.mark.slow),
        pytest.param(1030, marks=pytest.mark.slow),
    ],
)
def test_blockwise_equals_the_reference(on_mesh, length):
    arrays = make(length, heads=2, kv_heads=2, batch=1)
    assert_same(*blockwise_and_reference(on_mesh, arrays))


@pytest.mark.parametrize(
    ("kv_heads", "window", "segmented"),
    [
        pytest.param(2, None, False, marks=pytest.mark.slow),
        pytest.param(1, None, False, marks=pytest.mark.slow),
        pytest.param(4, 1, False, marks=pytest.mark.slow),
        (4, 7, False),
        pytest.param(4, 100, False, marks=pytest.mark.slow),
        pytest.param(4, 500, False, marks=pytest.mark.slow),
        pytest.param(4, None, True, marks=pytest.mark.slow),
        (2, 70, True),
    ],
)
def test_blockwise_equals_the_reference_in_every_feature(on_mesh, kv_heads, window, segmented):
    segments = segments_of(200) if segmented else None
    arrays = make(200, heads=4, kv_heads=kv_heads)
    assert_same(*blockwise_and_reference(on_mesh, arrays, segments=segments, window=window))


@pytest.mark.slow
def test_blockwise_equals_the_reference_with_all_features_over_many_blocks(on_mesh):
    arrays, segments = make(1030, heads=2, kv_heads=1), segments_of(1030)
    assert_same(*blockwise_and_reference(on_mesh, arrays, segments=segments, window=150))


@pytest.mark.slow
def test_blockwise_in_bfloat16_is_near_the_reference(on_mesh):
    arrays = make(130, heads=4, kv_heads=2, dtype=jnp.bfloat16)
    features = {"segments": segments_of(130), "window": 40}
    assert_same(*blockwise_and_reference(on_mesh, arrays, **features), tolerance=6e-2)


native = pytest.mark.skipif(not cpu.ready(), reason=f"no kernels: {cpu.why_not()}")


@native
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "head", "window", "segmented"),
    [
        (1, 1, 1, 32, None, False),
        (64, 2, 1, 64, None, True),
        (65, 2, 2, 32, None, False),
        (200, 4, 2, 96, 70, True),
        (130, 2, 2, 128, 1, False),
        (330, 3, 1, 32, 100, True),
        (330, 2, 2, 32, 500, False),
    ],
)
def test_the_native_kernel_equals_the_reference(
    on_mesh, length, heads, kv_heads, head, window, segmented
):
    arrays = make(length, heads, kv_heads, head=head)
    features = {"segments": segments_of(length) if segmented else None, "window": window}
    got, want = (attend_on(on_mesh(), arrays, one, **features) for one in ("native", "reference"))
    assert_same(got, want)


@native
@pytest.mark.parametrize("length", [200, 77])  # an even and an odd number of rows in the last block
def test_the_native_kernel_in_bfloat16_is_nearer_to_float32_than_blockwise(on_mesh, length):
    features = {"segments": segments_of(length), "window": 90}
    exact = make(length, heads=4, kv_heads=2, head=64, dtype=jnp.bfloat16)
    want = attend_on(on_mesh(), [np.float32(a) for a in exact], "reference", **features)
    got, other = (attend_on(on_mesh(), exact, one, **features) for one in ("native", "blockwise"))
    for mine, its, w in zip(got, other, want, strict=True):
        assert mine.dtype == jnp.bfloat16
        size = lambda x: np.sqrt(np.mean(np.square(x)))
        off = [size(np.float32(one) - w) / size(w) for one in (mine, its)]
        assert off[0] < min(off[1], 2**-8)  # less than a unit in the last place


@native
def test_the_native_kernel_shows_what_is_not_finite(on_mesh):
    q, k, v, do = make(70, heads=1, kv_heads=1, head=32, batch=1)
    k[0, 66, 0, 3] = np.nan
    out, dq, _, _ = attend_on(on_mesh(), (q, k, v, do), "native")
    assert np.isfinite(out[0, :66]).all()
    for one in (out, dq):
        assert np.isnan(one[0, 66:]).all()


def backends_on_cpus():
    return ["blockwise", "reference", *["native"] * cpu.ready()]


@pytest.mark.parametrize("backend", backends_on_cpus())
def test_attention_split_by_sequence_and_head_equals_one_device(on_mesh, backend):
    arrays = make(70, heads=4, kv_heads=2, batch=4, head=32 if backend == "native" else HEAD)
    features = {"segments": segments_of(70, batch=4), "window": 20}
    one, eight = (
        attend_on(on_mesh(*mesh), arrays, backend, **features) for mesh in ((1, 1, 1), (2, 2, 2))
    )
    assert_same(eight, one, tolerance=1e-6)


def test_window_counts_the_querys_own_key():
    mask = np.asarray(reference.causal_mask(6, None, 3))[0]
    expected = [[max(0, t - 2) <= s <= t for s in range(6)] for t in range(6)]
    np.testing.assert_array_equal(mask, expected)


def test_segments_mask_other_documents():
    mask = np.asarray(reference.causal_mask(4, jnp.array([[0, 0, 1, 1]]), None))[0]
    np.testing.assert_array_equal(mask, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]])


def test_alibi_slopes_equal_the_papers():
    eight = [2.0**-i for i in range(1, 9)]
    np.testing.assert_allclose(layers.alibi_slopes(8), eight, rtol=1e-6)
    np.testing.assert_allclose(layers.alibi_slopes(16), [2 ** (-i / 2) for i in range(1, 17)])
    twelve = [*eight, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]  # every other one of sixteen's
    np.testing.assert_allclose(layers.alibi_slopes(12), twelve, rtol=1e-6)


def test_alibi_subtracts_the_slope_times_the_distance(on_mesh):
    q, _, v, _ = make(5, heads=8, kv_heads=8, batch=1)
    out = attend_on(on_mesh(), (0 * q, 0 * q, v, q), "reference", positions="alibi")[0]
    for head in range(8):
        p = np.exp(-(2.0 ** -(head + 1)) * np.arange(4, -1, -1))
        np.testing.assert_allclose(out[0, 4, head], p / p.sum() @ v[0, :, head], atol=1e-6)


def test_scaled_bf16_alibi_rounds_slope_times_position_and_scales_it_with_the_scores(on_mesh):
    q, _, v, _ = make(300, heads=8, kv_heads=8, batch=1)
    arrays = (0 * q, 0 * q, v, q)
    out = attend_on(on_mesh(), arrays, "reference", positions="alibi", alibi="scaled_bf16")[0]
    for head in range(8):
        place = np.float32(np.arange(300).astype(jnp.bfloat16))
        bias = np.float32((2.0 ** -(head + 1) * place).astype(jnp.bfloat16)) / np.sqrt(HEAD)
        p = np.exp(bias - bias.max())
        np.testing.assert_allclose(out[0, -1, head], p / p.sum() @ v[0, :, head], atol=1e-6)


def test_soft_cap_bounds_the_scores_by_tanh(on_mesh):
    q, k, v, _ = make(6, heads=1, kv_heads=1, batch=1)
    out = attend_on(on_mesh(), (9 * q, k, v, q), "reference", attention_soft_cap=2.0)[0]
    score = 2 * np.tanh(k[0, :, 0] @ (9 * q[0, -1, 0]) / np.sqrt(HEAD) / 2)
    p = np.exp(score)
    np.testing.assert_allclose(out[0, -1, 0], p / p.sum() @ v[0, :, 0], atol=1e-6)


@pytest.mark.slow
def test_dropout_of_attention_weights_preserves_the_mean_and_depends_on_the_key(on_mesh):
    q, *_ = make(64, batch=1)
    arrays = (0 * q, 0 * q, np.ones_like(q), q)
    out, again, other = (
        attend_on(on_mesh(), arrays, "reference", dropout=0.5, seed=seed)[0] for seed in (0, 0, 1)
    )
    assert np.array_equal(out, again)
    assert not np.array_equal(out, other)
    assert float(out[:, 32:].mean()) == pytest.approx(1, abs=0.1)
    assert float(out[:, 32:].std()) > 0.05


# --- features and the choice ---------------------------------------------------------------------

BF16 = Sizes("bfloat16", 256)
WINDOWS_OF_DOCUMENTS = "cudnn" if jax.__version_info__ >= (0, 12) else "reference"
FEATURES = list(Requirements.__dataclass_fields__)


@pytest.mark.parametrize("name", ATTENTION_BACKENDS.names())
@pytest.mark.parametrize("feature", FEATURES)
def test_a_named_backend_that_lacks_a_feature_is_an_error_that_names_both(name, feature):
    backend = ATTENTION_BACKENDS[name]
    need = Requirements(
        **dict.fromkeys(("context", feature) if backend.requires_context else (feature,), True)
    )
    platform = backend.platforms[0]
    if feature in backend.features:
        assert choose(name, need, BF16, Target(platform)) == name
        return
    with pytest.raises(ConfigError) as refusal:
        choose(name, need, BF16, Target(platform))
    (problem,) = refusal.value.problems
    assert problem.startswith(f"compute.attention={name}: ")
    assert feature in problem


def test_the_error_names_every_missing_feature():
    with pytest.raises(ConfigError, match="alibi, dropout"):
        choose(
            "blockwise", Requirements(window=True, alibi=True, dropout=True), BF16, Target("cpu")
        )


@pytest.mark.parametrize(("name", "platform"), [("splash", "cpu"), ("cudnn", "tpu")])
def test_a_named_backend_on_another_platform_is_an_error(name, platform):
    with pytest.raises(
        ConfigError, match=f"{name}: needs a {ATTENTION_BACKENDS[name].platforms[0]}"
    ):
        choose(name, Requirements(), BF16, Target(platform))


def test_ring_requires_a_context_axis():
    with pytest.raises(ConfigError, match="ring: needs mesh"):
        choose("ring", Requirements(segments=True), BF16, Target("cpu"))
    assert choose("ring", Requirements(segments=True, context=True), BF16, Target("cpu")) == "ring"


@pytest.mark.parametrize(
    ("platform", "features", "expected"),
    [
        ("cpu", (), ON_CPU),
        ("cpu", ("segments", "window", "grouped"), ON_CPU),
        ("cpu", ("dropout",), "reference"),
        ("cpu", ("alibi",), "reference"),
        ("tpu", (), "splash"),
        ("tpu", ("segments", "window", "grouped"), "splash"),
        ("tpu", ("alibi",), "reference"),
        ("gpu", (), "cudnn"),
        ("gpu", ("window", "grouped"), "cudnn"),
        ("gpu", ("segments", "grouped"), "cudnn"),
        ("gpu", ("segments", "window"), WINDOWS_OF_DOCUMENTS),
        ("gpu", ("dropout",), "reference"),
        ("cpu", ("context",), "ring"),
        ("gpu", ("context", "segments", "alibi"), "ring"),
        ("tpu", ("context", "segments", "window"), "splash"),
        ("tpu", ("context", "alibi"), "ring"),
        ("cpu", ("context", "dropout"), "reference"),
    ],
)
def test_auto_chooses_the_fastest_backend_with_every_feature(platform, features, expected):
    assert (
        choose("auto", Requirements(**dict.fromkeys(features, True)), BF16, Target(platform))
        == expected
    )


@pytest.mark.parametrize(
    ("name", "sizes", "why"),
    [
        ("cudnn", Sizes("float32", 256), "compute.dtype=bfloat16"),
        ("cudnn", Sizes("bfloat16", 1023), "multiple of 2, not 1023"),
        ("cudnn", Sizes("bfloat16", 1024, head=60), "heads of a multiple of 8, not 60"),
        ("cudnn", Sizes("bfloat16", 1024, head=160), "heads of at most 128, not 160"),
        ("splash", Sizes("bfloat16", 200), "multiple of 128, not 200"),
        ("native", Sizes("bfloat16", 200, head=48), "heads of a multiple of 32, not 48"),
    ],
)
def test_unsupported_dtype_or_length_is_an_error_by_name_and_skipped_by_auto(name, sizes, why):
    platform = ATTENTION_BACKENDS[name].platforms[0]
    with pytest.raises(ConfigError, match=f"compute.attention={name}: needs .*{why}"):
        choose(name, Requirements(), sizes, Target(platform))
    other = "blockwise" if platform == "cpu" else "reference"
    assert choose("auto", Requirements(), sizes, Target(platform)) == other


def test_without_a_compiler_attention_is_blockwise(monkeypatch):
    monkeypatch.setattr(cpu, "why_not", lambda: "no C compiler was found")
    assert choose("auto", Requirements(), BF16, Target("cpu")) == "blockwise"
    with pytest.raises(ConfigError, match=r"compute\.attention=native: no C compiler was found"):
        choose("native", Requirements(), BF16, Target("cpu"))


@pytest.mark.parametrize(
    ("capability", "head", "why"),
    [
        ((7, 5), 64, "needs an A100 or newer"),
        ((8, 0), 128, None),
        ((8, 6), 136, "needs heads of at most 128, not 136"),
        ((9, 0), 192, None),
        ((9, 0), 256, None),
        ((9, 0), 264, "needs heads of at most 256, not 264"),
        ((10, 0), 192, "needs heads of at most 128, or of 256, not 192"),
        ((10, 3), 256, None),
        ((12, 0), 256, "needs heads of at most 128, not 256"),
    ],
)
def test_cudnn_takes_the_heads_that_a_gpu_has_graphs_for(capability, head, why):
    target, sizes = Target("gpu", capability), Sizes("bfloat16", 256, head)
    assert choose("auto", Requirements(), sizes, target) == ("reference" if why else "cudnn")
    if why:
        with pytest.raises(ConfigError, match=f"compute.attention=cudnn: {why}"):
            choose("cudnn", Requirements(), sizes, target)


@pytest.fixture
def registered(monkeypatch):
    """Registers a backend for one test, which gives the values times the scale."""

    def register(name, **fields):
        fields["attend_local"] = lambda self, q, k, v, segments, window, scale: v * scale
        monkeypatch.setattr(ATTENTION_BACKENDS, "_items", dict(ATTENTION_BACKENDS._items))
        backend = type("Toy", (LocalBackend,), {"platforms": ("cpu",), **fields})
        return ATTENTION_BACKENDS.register(name)(backend)

    return register


def test_a_backend_from_outside_is_chosen_by_name_and_runs(on_mesh, registered):
    registered("toy")
    assert choose("toy", Requirements(), BF16, Target("cpu")) == "toy"
    with pytest.raises(ConfigError, match=r"compute\.attention=toy: does not support alibi"):
        choose("toy", Requirements(alibi=True), BF16, Target("cpu"))
    q, k, v, do = make(8)
    out = attend_on(on_mesh(2, 1, 2), (q, k, v, do), "toy")[0]
    np.testing.assert_allclose(out, v * HEAD**-0.5, rtol=1e-6)


@pytest.mark.parametrize(("rank", "chosen"), [(None, ON_CPU), (0, "toy"), (1, "toy"), (99, ON_CPU)])
def test_auto_considers_a_backend_from_outside_by_its_rank(registered, rank, chosen):
    registered("toy", auto_rank=rank)
    assert choose("auto", Requirements(), BF16, Target("cpu")) == chosen


def test_an_unknown_backend_is_an_error_that_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"compute\.attention=flash9: unknown; known: splash"):
        choose("flash9", Requirements(), BF16, Target("cpu"))


# --- backends of other hardware, as far as they run here -----------------------------------------


@pytest.mark.parametrize(
    ("window", "kv_heads", "segmented"),
    [(None, 4, False), (None, 2, True), (1, 4, False), (7, 2, False), (500, 1, False)],
)
def test_arguments_to_cudnn_mean_the_same_as_the_references(
    on_mesh, monkeypatch, window, kv_heads, segmented
):
    original, asked = jax.nn.dot_product_attention, []

    def in_xla(*args, implementation, **settings):
        asked.append(implementation)
        return original(*args, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", in_xla)
    arrays = make(40, heads=4, kv_heads=kv_heads)
    cudnn = vendor.Cudnn()
    segments = segments_of(40) if segmented else None
    attend = lambda q, k, v: cudnn.attend_local(q, k, v, segments, window, HEAD**-0.5)
    got = both_passes(attend, *arrays)
    assert asked == ["cudnn"]
    assert_same(got, attend_on(on_mesh(), arrays, "reference", window=window, segments=segments))


@pytest.mark.parametrize(("remat", "forward"), [("dots", 1), ("block", 2)])
def test_remat_dots_runs_splashs_forward_pass_once(on_mesh, tiny_config, remat, forward):
    cfg = tiny_config(model={"heads": 2, "embed": 128}).model
    tokens = layers.Tokens(jnp.zeros((1, 128), jnp.int32))
    with on_mesh():

        def total(q, k, v):
            out = vendor.Splash().attend(cfg, Inputs(q, k, v, tokens, 0.125))
            return jnp.square(out).sum()  # whose gradient needs the output

        remade = jax.checkpoint(total, policy=blocks._REMAT[remat])
        arrays = make(128, heads=2, kv_heads=2, batch=1, head=64)[:3]
        q, k, v = (placed(a, "batch", "seq", "heads", None) for a in arrays)
        traced = str(jax.make_jaxpr(jax.grad(remade, (0, 1, 2)))(q, k, v))
    assert traced.count("name=splash_mha_fwd") == forward
    assert traced.count("name=splash_mha_dq") == 1


@pytest.mark.parametrize(
    ("length", "window", "parts"),
    [(1024, None, 1), (1024, 255, 1), (2048, None, 2), (2048, 1100, 2), (512, 1, 1), (512, 900, 1)],
)
def test_splash_is_given_the_mask_that_it_would_compute_by_each_element(length, window, parts):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    base = masks.CausalMask if window is None else masks.LocalMask
    order = np.arange(length).reshape(2 * parts, -1)
    order = np.concatenate([np.r_[order[i], order[-1 - i]] for i in range(parts)])
    sizes = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv")
    sizes += ("block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    made = []
    for kind in (base, vendor._by_blocks(base, window)):
        mask = kind((length, length), *(() if window is None else ((window - 1, 0), 0)))
        mask.q_sequence = order.astype(np.int32)
        blocks = kernel.BlockSizes(**dict.fromkeys(sizes, 128))
        all_heads = masks.MultiHeadMask([mask])
        made.append(
            kernel.make_splash_mha(all_heads, block_sizes=blocks, head_shards=1, q_seq_shards=parts)
        )
    for found, wanted in zip(*map(jax.tree.leaves, made), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("window", "kv_heads", "segmented", "cap", "context"),
    [
        pytest.param(None, 2, False, 1.5, 1, marks=pytest.mark.slow),
        pytest.param(50, 1, True, 0.0, 1, marks=pytest.mark.slow),
        pytest.param(None, 1, True, 0.0, 2, marks=pytest.mark.slow),
        pytest.param(50, 2, False, 0, 2, marks=pytest.mark.slow),
    ],
)
def test_splash_interpreted_equals_the_reference(
    on_mesh, monkeypatch, window, kv_heads, segmented, cap, context
):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

    interpreted = functools.partial(kernel.make_splash_mha, interpret=True)
    monkeypatch.setattr(kernel, "make_splash_mha", interpreted)
    arrays = make(256 * context, heads=2, kv_heads=kv_heads, head=64)
    segments = segments_of(256 * context) if segmented else None
    fields = {"segments": segments, "window": window, "attention_soft_cap": cap}
    want = attend_on(on_mesh(), arrays, "reference", **fields)
    got = attend_on(on_mesh(1, 1, context=context), arrays, "splash", **fields)
    assert_same(got, want)
