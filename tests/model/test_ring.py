"""Ring attention against the reference on one device, its schedule, its traffic and its FLOPs."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from both_passes import assert_same, attend_on, make, placed, segments_of

from gptjax.config import ModelConfig
from gptjax.model.attention import backends, ring
from gptjax.model.attention.backends import Inputs
from gptjax.model.layers import Tokens
from gptjax.plan import aot, collectives
from gptjax.plan.collectives import PERMUTE

pytestmark = pytest.mark.usefixtures("quick_compile", "small_blocks")

LENGTH, BLOCK = 64, 4
SEGMENTS = segments_of(LENGTH)
# Positions within their documents.
BEGINS = np.diff(SEGMENTS, axis=1, prepend=-1) > 0
WITHIN = np.arange(LENGTH) - np.maximum.accumulate(np.where(BEGINS, np.arange(LENGTH), 0), 1)

FEATURES = {
    "nothing": {},
    "segments": {"segments": SEGMENTS},
    "window": {"window": 11},
    "grouped": {"kv_heads": 2},
    "alibi": {"positions": "alibi"},
    "alibi of documents": {"positions": "alibi", "segments": SEGMENTS, "where": WITHIN},
    "rounded alibi": {"positions": "alibi", "alibi": "scaled_bf16"},
    "rounded alibi of documents": {
        "positions": "alibi",
        "alibi": "scaled_bf16",
        "segments": SEGMENTS,
        "where": WITHIN,
    },
    "soft cap": {"attention_soft_cap": 1.5},
    "segments, window, grouped": {"segments": SEGMENTS, "window": 11, "kv_heads": 2},
    "all": {
        "segments": SEGMENTS,
        "where": WITHIN,
        "window": 11,
        "kv_heads": 2,
        "positions": "alibi",
        "attention_soft_cap": 1.5,
    },
}


@pytest.fixture(scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ring, "_BLOCK", BLOCK)
        yield


@pytest.fixture(scope="module")
def reference(on_mesh):
    """Output and gradients of the reference on one device, by name of FEATURES."""

    @functools.cache
    def results(name):
        return attend_on(on_mesh(), arrays_of(name), "reference", **options(name))

    return results


def arrays_of(name):
    return make(LENGTH, heads=4, kv_heads=FEATURES[name].get("kv_heads", 4))


def options(name):
    return {key: value for key, value in FEATURES[name].items() if key != "kv_heads"}


def assert_near(got, want, tolerance):
    """Within the tolerance of the largest element."""
    for part, g, w in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        largest = np.abs(np.float32(w)).max()
        np.testing.assert_allclose(
            np.float32(g) / largest, np.float32(w) / largest, atol=tolerance, rtol=0, err_msg=part
        )


QUICK = ("window", "segments")
MESHES = [
    {"context": 2},
    {"context": 4},
    {"context": 8},
    {"tensor": 2, "context": 2},
    {"data": 2, "context": 4},
]


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        # Each feature on one mesh of several parts, and all of them together on every one.
        *(
            pytest.param(name, MESHES[3 + i % 2], marks=[pytest.mark.slow] * (name not in QUICK))
            for i, name in enumerate(FEATURES)
        ),
        ("all", MESHES[3]),
        *(pytest.param("all", mesh, marks=pytest.mark.slow) for mesh in MESHES[:3]),
        ("nothing", {"context": 8}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.items())),
)
def test_ring_equals_the_reference_on_one_device(on_mesh, reference, name, mesh):
    got = attend_on(on_mesh(**mesh), arrays_of(name), "ring", **options(name))
    assert_near(got, reference(name), 1e-6)


@pytest.mark.parametrize("length", [4, 44])  # halves of 1 and 11
def test_block_size_divides_any_length(on_mesh, length):
    arrays = make(length, heads=2, kv_heads=2)
    want = attend_on(on_mesh(), arrays, "reference")
    assert_near(attend_on(on_mesh(context=2), arrays, "ring"), want, 1e-6)


@pytest.mark.slow
def test_ring_in_bfloat16_is_as_accurate_as_the_reference(on_mesh):
    low = make(LENGTH, heads=4, kv_heads=2, dtype=jnp.bfloat16)
    features = {"segments": SEGMENTS, "attention_soft_cap": 1.5}
    exact = attend_on(on_mesh(), [np.float32(a) for a in low], "reference", **features)
    near = attend_on(on_mesh(), low, "reference", **features)
    got = attend_on(on_mesh(context=8), low, "ring", **features)
    assert {a.dtype for a in got} == {jnp.dtype("bfloat16")}
    rms = lambda a: float(np.sqrt(np.square(np.float32(a)).mean()))
    for part, g, n, e in zip(("out", "dq", "dk", "dv"), got, near, exact, strict=True):
        own, references = (rms(np.float32(x) - e) / rms(e) for x in (g, n))
        # XLA:CPU rounds each block's products to bfloat16 before they are added up.
        assert 0 < own < min(2 * references, 1e-2), part


def test_key_blocks_beyond_the_window_are_never_read(on_mesh):
    """NaN in a block that is read, even if only to be masked, would spread."""
    q, k, v, do = make(LENGTH, heads=2, kv_heads=2)
    want = attend_on(on_mesh(), (q, k, v, do), "reference", window=BLOCK)[0]
    v[:, : 2 * BLOCK] = np.nan
    out = attend_on(on_mesh(context=4), (q, k, v, do), "ring", window=BLOCK)[0]
    assert_same([out[:, 3 * BLOCK :]], [want[:, 3 * BLOCK :]], tolerance=1e-5)
    assert np.isnan(out[:, : 2 * BLOCK]).all()


# --- the schedule, without devices ---------------------------------------------------------------


@pytest.mark.parametrize(("devices", "blocks"), [(2, 2), (2, 6), (3, 4), (8, 2)])
def test_the_ring_computes_every_causal_pair_of_blocks_once(devices, blocks):
    pairs = ring.block_pairs(blocks)
    starts = [ring.block_starts(device, devices, blocks, 1) for device in range(devices)]
    assert sorted(np.concatenate(starts)) == list(range(devices * blocks))
    computed = []
    for device in range(devices):
        for step in range(devices):
            owner = ring.key_owner(device, step, devices)
            chosen = pairs.earlier if owner < device else pairs.later
            for query, key in pairs.own if step == 0 else chosen:
                computed.append((int(starts[device][query]), int(starts[owner][key])))
    causal = [(query, key) for query in range(devices * blocks) for key in range(query + 1)]
    assert sorted(computed) == causal


def test_every_device_has_the_same_number_of_pairs_at_every_step():
    pairs = ring.block_pairs(6)
    assert len(pairs.earlier) == len(pairs.later) == 6 * 6 // 2
    assert len(pairs.own) == 6 * 7 // 2


# --- traffic and FLOPs ---------------------------------------------------------------------------


def traced(mesh, name, *, backward):
    """The forward pass, or both passes, traced."""
    batch, length, heads, head = arrays_of(name)[0].shape
    fields = {k: v for k, v in options(name).items() if k in ("positions", "attention_soft_cap")}
    cfg = ModelConfig(heads=heads, kv_heads=arrays_of(name)[1].shape[2], head_dim=head, **fields)
    arrays = [placed(a, "batch", "seq", "heads", None) for a in arrays_of(name)]
    rows = [placed(np.full((batch, length), i), "batch", "seq") for i in range(2)]
    segments = rows[1] if "segments" in options(name) else None

    def forward(q, k, v):
        inputs = Inputs(q, k, v, Tokens(rows[0], segments), cfg.attention_scale)
        return backends.attend(cfg, inputs, backend_name="ring")

    def both(q, k, v, do):
        out, pull = jax.vjp(forward, q, k, v)
        return out, *pull(do)

    return jax.jit(both if backward else forward).trace(*arrays[: 4 if backward else 3])


@pytest.mark.parametrize(
    ("context", "name", "more"),
    [
        pytest.param(2, "nothing", 0, marks=pytest.mark.slow),
        (4, "nothing", 0),
        pytest.param(4, "segments", 1, marks=pytest.mark.slow),
        pytest.param(4, "alibi", 1, marks=pytest.mark.slow),
        (4, "alibi of documents", 2),
    ],
)
def test_forward_pass_sends_keys_and_values_and_nothing_else(on_mesh, context, name, more):
    with on_mesh(context=context) as mesh:
        program = traced(mesh, name, backward=False).lower().compile().as_text()
        found = collectives.by_axes(list(aot.program_collectives(program, mesh.shape)))
    tokens = 2 * LENGTH // context
    steps, keys, ids = context - 1, tokens * 4 * 8 * 4, tokens * 4
    assert found == {(PERMUTE, ("context",)): ((2 + more) * steps, (2 * keys + more * ids) * steps)}


@pytest.mark.parametrize("context", [2, 4])
def test_backward_pass_sends_keys_again_and_their_gradients_a_whole_turn(on_mesh, context):
    with on_mesh(context=context) as mesh:
        program = traced(mesh, "nothing", backward=True).lower().compile().as_text()
        found = collectives.by_axes(list(aot.program_collectives(program, mesh.shape)))
    keys, steps = 2 * LENGTH // context * 4 * 8 * 4, context - 1
    # Here XLA sees that the first thing that both passes send is the same.
    count = 2 * steps + (2 * steps - 2) + 2 * context
    assert found == {(PERMUTE, ("context",)): (count, count * keys)}


def test_a_scan_over_layers_does_not_precompute_the_masks_of_all_blocks(on_mesh):
    cfg = ModelConfig(heads=4, head_dim=8)
    with on_mesh(context=4):
        q, *_ = (placed(a, "batch", "seq", "heads", None) for a in arrays_of("nothing"))
        rows = placed(np.zeros(q.shape[:2], np.int32), "batch", "seq")

        def layer(x, scale):
            inputs = Inputs(x, x * scale, x, Tokens(rows), cfg.attention_scale)
            return backends.attend(cfg, inputs, backend_name="ring"), None

        layer = jax.checkpoint(layer, prevent_cse=False)
        loss = lambda x, scales: jax.lax.scan(layer, x, scales)[0].sum()
        text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(q, jnp.ones(3)))
    sizes = [np.prod([int(n) for n in m.split(",")]) for m in re.findall(r"bool\[([\d,]+)\]", text)]
    assert 0 < max(sizes) <= 2 * 4 * BLOCK * BLOCK  # batch x heads x one block


def products(jaxpr):
    """FLOPs of one device's matrix products, and whether there are any branches."""
    total, branches = 0, False
    for one in jaxpr.eqns:
        if one.primitive.name == "dot_general":
            (inner, _), _ = one.params["dimension_numbers"]
            size = np.prod([one.invars[0].aval.shape[i] for i in inner])
            total += 2 * size * np.prod(one.outvars[0].aval.shape)
        branches |= one.primitive.name in ("cond", "while")
        for inner in jax.tree.leaves(list(one.params.values())):
            if not hasattr(inner, "eqns"):
                continue
            flops, more = products(inner)
            total += flops * one.params.get("length", 1)
            branches |= more
    return total, branches


@pytest.mark.parametrize("context", [2, 4, 8])
@pytest.mark.parametrize("backward", [False, True])
def test_every_device_computes_half_of_the_scores(on_mesh, context, backward):
    """Half of a square of blocks, and the other half of the blocks on its diagonal."""
    with on_mesh(context=context) as mesh:
        flops, branches = products(traced(mesh, "nothing", backward=backward).jaxpr.jaxpr)
    square = 2 * 2 * 4 * LENGTH * LENGTH * 8  # one product's, over batch, heads and head_dim
    share = 1 / 2 + 1 / 2 / (LENGTH / BLOCK)
    assert not branches  # one program for all devices: they differ in data alone
    assert flops == pytest.approx((2 + 5 * backward) * square / context * share, rel=1e-12)
