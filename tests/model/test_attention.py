"""Every backend against the reference, and the table of what each can do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from both_passes import HEAD, assert_same, attend_on, both_passes, make, segments_of

from gptjax.errors import ConfigError
from gptjax.model import layers
from gptjax.model.attention import backends, reference, vendor
from gptjax.model.attention.backends import Requirements, Sizes, choose

pytestmark = pytest.mark.usefixtures("quick_compile")


def test_the_reference_is_softmax_of_the_scaled_products_over_earlier_keys(on_mesh):
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


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200, 1030])
def test_blockwise_equals_the_reference(on_mesh, length):
    arrays = make(length, heads=2, kv_heads=2, batch=1)
    assert_same(*blockwise_and_reference(on_mesh, arrays))


@pytest.mark.parametrize(
    ("kv_heads", "window", "segmented"),
    [
        (2, None, False),
        (1, None, False),
        (4, 1, False),
        (4, 7, False),
        (4, 100, False),
        (4, 500, False),
        (4, None, True),
        (2, 70, True),
    ],
)
def test_blockwise_equals_the_reference_in_every_feature(on_mesh, kv_heads, window, segmented):
    segments = segments_of(200) if segmented else None
    arrays = make(200, heads=4, kv_heads=kv_heads)
    assert_same(*blockwise_and_reference(on_mesh, arrays, segments=segments, window=window))


def test_blockwise_equals_the_reference_with_all_features_over_many_blocks(on_mesh):
    arrays, segments = make(1030, heads=2, kv_heads=1), segments_of(1030)
    assert_same(*blockwise_and_reference(on_mesh, arrays, segments=segments, window=150))


def test_blockwise_in_bfloat16_is_near_the_reference(on_mesh):
    arrays = make(130, heads=4, kv_heads=2, dtype=jnp.bfloat16)
    features = {"segments": segments_of(130), "window": 40}
    assert_same(*blockwise_and_reference(on_mesh, arrays, **features), tolerance=6e-2)


@pytest.mark.parametrize("backend", ["blockwise", "reference"])
def test_a_mesh_of_rows_and_heads_equals_one_device(on_mesh, backend):
    arrays = make(70, heads=4, kv_heads=2, batch=4)
    features = {"segments": segments_of(70, batch=4), "window": 20}
    one, eight = (
        attend_on(on_mesh(*mesh), arrays, backend, **features) for mesh in ((1, 1, 1), (2, 2, 2))
    )
    assert_same(eight, one, tolerance=1e-6)


def test_a_window_is_as_many_keys_with_the_querys_own_among_them():
    mask = np.asarray(reference.causal_mask(6, None, 3))[0]
    expected = [[max(0, t - 2) <= s <= t for s in range(6)] for t in range(6)]
    np.testing.assert_array_equal(mask, expected)


def test_segments_hide_other_documents():
    mask = np.asarray(reference.causal_mask(4, jnp.array([[0, 0, 1, 1]]), None))[0]
    np.testing.assert_array_equal(mask, [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]])


def test_alibi_slopes_are_those_of_the_paper():
    eight = [2.0**-i for i in range(1, 9)]
    np.testing.assert_allclose(layers.alibi_slopes(8), eight, rtol=1e-6)
    np.testing.assert_allclose(layers.alibi_slopes(16), [2 ** (-i / 2) for i in range(1, 17)])
    twelve = [*eight, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]  # every other one of sixteen's
    np.testing.assert_allclose(layers.alibi_slopes(12), twelve, rtol=1e-6)


def test_alibi_lowers_a_score_by_the_slope_for_each_token_of_distance(on_mesh):
    q, _, v, _ = make(5, heads=8, kv_heads=8, batch=1)
    out = attend_on(on_mesh(), (0 * q, 0 * q, v, q), "reference", positions="alibi")[0]
    for head in range(8):
        p = np.exp(-(2.0 ** -(head + 1)) * np.arange(4, -1, -1))
        np.testing.assert_allclose(out[0, 4, head], p / p.sum() @ v[0, :, head], atol=1e-6)


def test_rounded_alibi_is_the_slope_times_the_place_in_bfloat16_scaled_with_the_scores(on_mesh):
    q, _, v, _ = make(300, heads=8, kv_heads=8, batch=1)
    arrays = (0 * q, 0 * q, v, q)
    out = attend_on(on_mesh(), arrays, "reference", positions="alibi", alibi="scaled_bf16")[0]
    for head in range(8):
        place = np.float32(np.arange(300).astype(jnp.bfloat16))
        bias = np.float32((2.0 ** -(head + 1) * place).astype(jnp.bfloat16)) / np.sqrt(HEAD)
        p = np.exp(bias - bias.max())
        np.testing.assert_allclose(out[0, -1, head], p / p.sum() @ v[0, :, head], atol=1e-6)


def test_a_soft_cap_bounds_the_scores_by_tanh(on_mesh):
    q, k, v, _ = make(6, heads=1, kv_heads=1, batch=1)
    out = attend_on(on_mesh(), (9 * q, k, v, q), "reference", attention_soft_cap=2.0)[0]
    score = 2 * np.tanh(k[0, :, 0] @ (9 * q[0, -1, 0]) / np.sqrt(HEAD) / 2)
    p = np.exp(score)
    np.testing.assert_allclose(out[0, -1, 0], p / p.sum() @ v[0, :, 0], atol=1e-6)


def test_dropout_of_attention_weights_is_scaled_and_keyed(on_mesh):
    q, *_ = make(64, batch=1)
    arrays = (0 * q, 0 * q, np.ones_like(q), q)
    out, again, other = (
        attend_on(on_mesh(), arrays, "reference", dropout=0.5, seed=seed)[0] for seed in (0, 0, 1)
    )
    assert np.array_equal(out, again)
    assert not np.array_equal(out, other)
    assert float(out[:, 32:].mean()) == pytest.approx(1, abs=0.1)
    assert float(out[:, 32:].std()) > 0.05


# --- the table ---------------------------------------------------------------------------------

BF16 = Sizes("bfloat16", 256)
FEATURES = list(Requirements.__dataclass_fields__)


@pytest.mark.parametrize("name", list(backends.BACKENDS))
@pytest.mark.parametrize("feature", FEATURES)
def test_a_named_backend_without_a_feature_is_refused_by_name(name, feature):
    backend = backends.BACKENDS[name]
    need = Requirements(
        **dict.fromkeys(("context", feature) if backend.split else (feature,), True)
    )
    platform = backend.platforms[0]
    if feature in backend.features:
        assert choose(name, need, BF16, platform) == name
        return
    with pytest.raises(ConfigError) as refusal:
        choose(name, need, BF16, platform)
    (problem,) = refusal.value.problems
    assert problem.startswith(f"compute.attention={name}: ")
    assert feature in problem


def test_a_refusal_names_every_missing_feature():
    with pytest.raises(ConfigError, match="alibi, dropout"):
        choose("blockwise", Requirements(window=True, alibi=True, dropout=True), BF16, "cpu")


@pytest.mark.parametrize(("name", "platform"), [("splash", "cpu"), ("cudnn", "tpu")])
def test_a_named_backend_on_another_platform_is_refused(name, platform):
    with pytest.raises(
        ConfigError, match=f"{name}: needs a {backends.BACKENDS[name].platforms[0]}"
    ):
        choose(name, Requirements(), BF16, platform)


def test_the_ring_is_for_sequences_that_are_split_over_devices():
    with pytest.raises(ConfigError, match="ring: needs mesh"):
        choose("ring", Requirements(segments=True), BF16, "cpu")
    assert choose("ring", Requirements(segments=True, context=True), BF16, "cpu") == "ring"


@pytest.mark.parametrize(
    ("platform", "features", "expected"),
    [
        ("cpu", (), "blockwise"),
        ("cpu", ("segments", "window", "grouped"), "blockwise"),
        ("cpu", ("dropout",), "reference"),
        ("cpu", ("alibi",), "reference"),
        ("tpu", (), "splash"),
        ("tpu", ("segments", "window", "grouped"), "splash"),
        ("tpu", ("alibi",), "reference"),
        ("gpu", (), "cudnn"),
        ("gpu", ("window", "grouped"), "cudnn"),
        ("gpu", ("segments",), "reference"),
        ("gpu", ("dropout",), "reference"),
        ("cpu", ("context",), "ring"),
        ("gpu", ("context", "segments", "alibi"), "ring"),
        ("tpu", ("context", "segments", "window"), "splash"),
        ("tpu", ("context", "alibi"), "ring"),
        ("cpu", ("context", "dropout"), "reference"),
    ],
)
def test_auto_takes_the_fastest_that_has_every_feature(platform, features, expected):
    assert choose("auto", Requirements(**dict.fromkeys(features, True)), BF16, platform) == expected


@pytest.mark.parametrize(
    ("name", "sizes", "why"),
    [
        ("cudnn", Sizes("float32", 256), "compute.dtype=bfloat16"),
        ("splash", Sizes("bfloat16", 200), "multiple of 128, not 200"),
    ],
)
def test_what_a_backend_cannot_take_is_refused_by_name_and_passed_over_by_auto(name, sizes, why):
    platform = backends.BACKENDS[name].platforms[0]
    with pytest.raises(ConfigError, match=f"compute.attention={name}: needs .*{why}"):
        choose(name, Requirements(), sizes, platform)
    assert choose("auto", Requirements(), sizes, platform) == "reference"


# --- backends of other hardware: what their arguments mean, where it can be seen here ----------


@pytest.mark.parametrize(("window", "kv_heads"), [(None, 4), (None, 2), (1, 4), (7, 2), (500, 1)])
def test_cudnns_arguments_mean_what_the_reference_does(on_mesh, monkeypatch, window, kv_heads):
    original, asked = jax.nn.dot_product_attention, []

    def in_xla(*args, implementation, **settings):
        asked.append(implementation)
        return original(*args, implementation="xla", **settings)

    monkeypatch.setattr(jax.nn, "dot_product_attention", in_xla)
    arrays = make(40, heads=4, kv_heads=kv_heads)
    got = both_passes(lambda q, k, v: vendor.cudnn(q, k, v, None, window), *arrays)
    assert asked == ["cudnn"]
    assert_same(got, attend_on(on_mesh(), arrays, "reference", window=window))


@pytest.mark.parametrize(
    ("window", "kv_heads", "segmented", "cap", "context"),
    [
        (None, 2, False, 1.5, 1),
        (50, 1, True, 0.0, 1),
        (None, 1, True, 0.0, 2),
        (50, 2, False, 0, 2),
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
