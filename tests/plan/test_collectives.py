"""Communication of a step: against figures worked out by hand, and against the compiled step.

In the figures: D embed, H and K heads, C head_dim, F feed-forward, V rows of a table, L layers.
Wire bytes of one of n devices: (n-1)/n of an array that is gathered, scattered or exchanged, twice
that of one that is all-reduced.
"""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest
from shapes import LLAMA

from gptjax.config import MeshConfig, MoeConfig
from gptjax.model import decoder
from gptjax.parallel import sharding
from gptjax.parallel.mesh import AXES, make_mesh
from gptjax.plan import aot, collectives
from gptjax.plan.collectives import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    PERMUTE,
    REDUCE_SCATTER,
    Collective,
)
from gptjax.runtime import hardware
from gptjax.training import objective
from gptjax.training.step import compile_step, create_state

# Of `by_hand`, in elements: q and o are D x HC, k and v D x KC, gate, up and down D x F.
LAYERS, LAYER, TABLE, EMBED = 3, 2 * 32 * 32 + 2 * 32 * 8 + 3 * 32 * 64, 128 * 32, 32
TOKENS = 16 * 32  # of a batch


@pytest.fixture
def by_hand(tiny_config):
    """D = 32, H = 8, K = 2, C = 4, F = 64, V = 128, L = 3, in bfloat16 unless told otherwise."""

    def make(model=None, **sections):
        shape = {"layers": LAYERS, "kv_heads": 2, "mlp": 64}
        compute = {"dtype": "bfloat16", **sections.pop("compute", {})}
        return tiny_config(model={**LLAMA, **shape, **(model or {})}, compute=compute, **sections)

    return make


def sizes_of(**sizes):
    return dict.fromkeys(AXES, 1) | sizes


def wires(cfg, **sizes):
    """Bytes on the wire by kind and axes."""
    table = collectives.by_axes(collectives.step_collectives(cfg, sizes_of(**sizes)))
    return {key: wire for key, (_, wire) in table.items()}


# --- wire bytes of a collective ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "wire"),
    [
        (ALL_GATHER, 3 / 4 * 1000 * 6),
        (REDUCE_SCATTER, 3 / 4 * 1000 * 6),
        (ALL_TO_ALL, 3 / 4 * 1000 * 6),
        (ALL_REDUCE, 2 * 3 / 4 * 1000 * 6),
        (PERMUTE, 1000 * 6),
    ],
)
def test_wire_bytes_by_kind(kind, wire) -> None:
    assert Collective(kind, ("fsdp",), 4, 1000.0, 6.0, "").wire_bytes == pytest.approx(wire)


def test_by_axes_sums_over_purposes() -> None:
    table = collectives.by_axes(
        [
            Collective(ALL_GATHER, ("fsdp",), 2, 10.0, 3.0, "q"),
            Collective(ALL_GATHER, ("fsdp",), 2, 20.0, 1.0, "k", "outside"),
            Collective(ALL_GATHER, ("tensor",), 2, 20.0, 1.0, "rows"),
            Collective(ALL_REDUCE, ("data", "fsdp"), 4, 8.0, 1.0, "scales"),
        ]
    )
    assert table == {
        (ALL_GATHER, ("fsdp",)): (4, 25),
        (ALL_GATHER, ("tensor",)): (1, 10),
        (ALL_REDUCE, ("data", "fsdp")): (1, 12),
    }


# --- against figures by hand ---------------------------------------------------------------------


def test_one_device_has_no_collectives(by_hand) -> None:
    assert collectives.step_collectives(by_hand(), sizes_of()) == []


def test_fsdp_gathers_weights_twice_and_scatters_gradients_once(by_hand) -> None:
    share = 7 / 8
    assert wires(by_hand(), fsdp=8) == pytest.approx(
        {
            # forward and backward; both tables once, all in bfloat16
            (ALL_GATHER, ("fsdp",)): share * (2 * LAYERS * LAYER * 2 + 2 * TABLE * 2),
            # in bfloat16; the tables' in float32
            (REDUCE_SCATTER, ("fsdp",)): share * (LAYERS * LAYER * 2 + 2 * TABLE * 4),
            # two scales a layer
            (ALL_REDUCE, ("fsdp",)): 2 * share * LAYERS * 2 * EMBED * 2,
        }
    )


@pytest.mark.parametrize(("ring_tokens", "ring"), [(TOKENS // 4, True), (TOKENS // 4 + 1, False)])
def test_permutes_scatter_gradients_of_layers_from_enough_tokens(
    by_hand, ring_tokens, ring
) -> None:
    cfg, sizes = by_hand(), sizes_of(fsdp=4)
    device = replace(hardware.find("TPU v5e"), ring_tokens=ring_tokens)
    found = collectives.by_axes(collectives.step_collectives(cfg, sizes, device=device))
    matrices, layers, tables = 7 * LAYERS, 3 / 4 * LAYERS * LAYER * 2, 3 / 4 * 2 * TABLE * 4
    # A matrix's gradient takes three permutes of a quarter.
    permutes = (3 * matrices, pytest.approx(layers)) if ring else None
    scatters = (2, tables) if ring else (matrices + 2, tables + layers)
    assert found.get((PERMUTE, ("fsdp",))) == permutes
    assert found[REDUCE_SCATTER, ("fsdp",)] == pytest.approx(scatters)


def test_float32_doubles_all_but_gradients_of_tables(by_hand) -> None:
    share, cfg = 7 / 8, by_hand(compute={"dtype": "float32"})
    assert wires(cfg, fsdp=8) == pytest.approx(
        {
            (ALL_GATHER, ("fsdp",)): share * (2 * LAYERS * LAYER * 4 + 2 * TABLE * 4),
            (REDUCE_SCATTER, ("fsdp",)): share * (LAYERS * LAYER * 4 + 2 * TABLE * 4),
            (ALL_REDUCE, ("fsdp",)): 2 * share * LAYERS * 2 * EMBED * 4,
        }
    )


def test_fsdp_over_two_rings_gathers_parts_over_the_inner_one(by_hand) -> None:
    gathered, scattered = 2 * LAYERS * LAYER * 2 + 2 * TABLE * 2, LAYERS * LAYER * 2 + 2 * TABLE * 4
    assert wires(by_hand(), fsdp=4, fsdp_2=2) == pytest.approx(
        {
            (ALL_GATHER, ("fsdp",)): 3 / 4 * gathered,
            (ALL_GATHER, ("fsdp_2",)): 1 / 2 * gathered / 4,
            (REDUCE_SCATTER, ("fsdp",)): 3 / 4 * scattered,
            (REDUCE_SCATTER, ("fsdp_2",)): 1 / 2 * scattered / 4,
            (ALL_REDUCE, ("fsdp", "fsdp_2")): 2 * 7 / 8 * LAYERS * 2 * EMBED * 2,
        }
    )


def test_data_parallel_axis_sums_gradients_only(by_hand) -> None:
    gathered, scattered = 2 * LAYERS * LAYER * 2 + 2 * TABLE * 2, LAYERS * LAYER * 2 + 2 * TABLE * 4
    assert wires(by_hand(), data=2, fsdp=4) == pytest.approx(
        {
            (ALL_GATHER, ("fsdp",)): 3 / 4 * gathered,
            (REDUCE_SCATTER, ("fsdp",)): 3 / 4 * scattered,
            (ALL_REDUCE, ("data",)): 2 * 1 / 2 * scattered / 4,
            (ALL_REDUCE, ("data", "fsdp")): 2 * 7 / 8 * LAYERS * 2 * EMBED * 2,
        }
    )


@pytest.mark.parametrize(("remat", "again"), [("none", 0), ("dots", 0), ("block", 1)])
def test_tensor_axis_gathers_and_scatters_tokens(by_hand, remat, again) -> None:
    cfg = by_hand(compute={"remat": remat})
    rows = TOKENS // 4 * EMBED * 2  # bytes of the tokens that two devices of the axis share
    # A layer has two pairs of products. Tokens are gathered into each, again in its backward pass,
    # and so are the gradients of its output; its output and the gradients of its input are
    # scattered. A block that is recomputed needs the output of the first pair again.
    gathers, scatters = LAYERS * 2 * 3, LAYERS * (2 * 2 + again)
    # Outside: embedded tokens scattered, tokens gathered for the loss, and the reverse of both.
    gathers, scatters = gathers + 2, scatters + 2
    assert wires(cfg, data=2, fsdp=2, tensor=2) == pytest.approx(
        {
            (ALL_GATHER, ("tensor",)): 1 / 2 * rows * gathers,
            (REDUCE_SCATTER, ("tensor",)): 1 / 2 * rows * scatters,
            # largest, sum and target's logit of each token, in float32
            (ALL_REDUCE, ("tensor",)): 2 * 1 / 2 * 3 * 4 * TOKENS / 4,
            # every device of the axis has half of each weight
            (ALL_GATHER, ("fsdp",)): 1 / 2 * (2 * LAYERS * LAYER * 2 + 2 * TABLE * 2) / 2,
            (REDUCE_SCATTER, ("fsdp",)): 1 / 2 * (LAYERS * LAYER * 2 + 2 * TABLE * 4) / 2,
            (ALL_REDUCE, ("data",)): 2 * 1 / 2 * (LAYERS * LAYER * 2 + 2 * TABLE * 4) / 2 / 2,
            # a device normalises its own tokens: scales are summed over the axis, too
            (ALL_REDUCE, ("data", "fsdp", "tensor")): 2 * 7 / 8 * LAYERS * 2 * EMBED * 2,
        }
    )


def test_tokens_that_tensor_axis_does_not_divide_are_all_reduced(by_hand) -> None:
    cfg = by_hand(train={"seq_len": 31, "batch_tokens": 4 * 31})
    rows = 31 * EMBED * 2  # one sequence a device
    found = wires(cfg, data=2, fsdp=2, tensor=2)
    sums = LAYERS * 4 + 2
    assert found[ALL_REDUCE, ("tensor",)] == pytest.approx(rows * sums + 3 * 4 * 31)
    assert (ALL_GATHER, ("tensor",)) not in found
    assert (REDUCE_SCATTER, ("tensor",)) not in found
    assert (
        ALL_REDUCE,
        ("data", "fsdp"),
    ) in found  # of scales: each device has all tokens of its two


def test_accumulation_repeats_weights_and_splits_tokens(by_hand) -> None:
    once = collectives.step_collectives(by_hand(), sizes_of(data=2, fsdp=2, tensor=2))
    four = collectives.step_collectives(
        by_hand(train={"accumulation": 4}), sizes_of(data=2, fsdp=2, tensor=2)
    )
    for a, b in zip(once, four, strict=True):
        assert (a.kind, a.axes, a.purpose) == (b.kind, b.axes, b.purpose)
        assert b.count == 4 * a.count
        of_rows = a.axes == ("tensor",)
        assert b.wire_bytes == pytest.approx(a.wire_bytes if of_rows else 4 * a.wire_bytes), (
            a.purpose
        )
    assert any(one.axes == ("tensor",) for one in once)


def test_tied_table_is_gathered_once_for_both_uses(by_hand) -> None:
    untied = wires(by_hand(), fsdp=8)[ALL_GATHER, ("fsdp",)]
    tied = wires(by_hand({"tied_embeddings": True}), fsdp=8)[ALL_GATHER, ("fsdp",)]
    assert untied - tied == pytest.approx(7 / 8 * TABLE * 2)


def test_learned_positions_and_biases_add_communication(by_hand) -> None:
    plain = wires(by_hand({"activation": "gelu_tanh"}), fsdp=8)
    more = wires(
        by_hand(
            {
                "activation": "gelu_tanh",
                "norm": "layernorm",
                "linear_bias": True,
                "positions": "learned",
            }
        ),
        fsdp=8,
    )
    places = 32 * EMBED  # as long as the sequences, not as the context
    # In a layer: two norms' biases; of q, k, v, o, up and down.
    biases = 2 * EMBED + 8 * 4 + 2 * 2 * 4 + EMBED + 64 + EMBED
    assert more[ALL_GATHER, ("fsdp",)] - plain[ALL_GATHER, ("fsdp",)] == pytest.approx(
        7 / 8 * places * 2
    )
    assert more[REDUCE_SCATTER, ("fsdp",)] == plain[REDUCE_SCATTER, ("fsdp",)]
    sums = more[ALL_REDUCE, ("fsdp",)] - plain[ALL_REDUCE, ("fsdp",)]
    assert sums == pytest.approx(2 * 7 / 8 * (places * 4 + LAYERS * biases * 2))


@pytest.mark.parametrize(("remat", "steps"), [("none", 3 + 3), ("dots", 3 + 3), ("block", 9 - 1)])
def test_ring_attention_sends_keys_in_each_pass_and_gradients_once_around(
    by_hand, remat, steps
) -> None:
    cfg = by_hand({"positions": "alibi"}, compute={"remat": remat}, data={"documents": "mask"})
    sizes = sizes_of(data=2, context=4)
    found = collectives.by_axes(collectives.step_collectives(cfg, sizes, ("ring",)))
    keys, ids = TOKENS // 8 * 2 * 4, TOKENS // 8 * 4  # elements of K x C; bytes
    # In each pass three steps bring the other devices' keys and values, documents and positions;
    # the recomputation and the backward pass share their first. A fourth brings the gradients, in
    # float32, home. remat=dots keeps the ring's output.
    wire = steps * (2 * keys * 2 + 2 * ids) + 4 * 2 * keys * 4
    assert found[PERMUTE, ("context",)] == (
        pytest.approx(LAYERS * (steps * 4 + 4 * 2)),
        pytest.approx(LAYERS * wire),
    )
    assert (ALL_GATHER, ("context",)) not in found
    gathered = collectives.by_axes(collectives.step_collectives(cfg, sizes, ("splash",)))
    assert (PERMUTE, ("context",)) not in gathered
    assert (ALL_GATHER, ("context",)) in gathered
    half = collectives.by_axes(collectives.step_collectives(cfg, sizes, ("ring", "splash")))
    assert half[PERMUTE, ("context",)][1] == pytest.approx(LAYERS * wire / 2)
    assert half[ALL_GATHER, ("context",)][1] == pytest.approx(
        gathered[ALL_GATHER, ("context",)][1] / 2
    )


# --- a mixture of experts: E = 4, two of a token, each 64 wide ------------------------------------

EXPERTS = MoeConfig(experts=4, top_k=2, hidden=64, capacity=1.25)


@pytest.mark.parametrize(("remat", "passes"), [("none", 2), ("dots", 3), ("block", 3)])
def test_experts_with_capacity_exchange_buffers(by_hand, remat, passes) -> None:
    cfg = by_hand({"moe": EXPERTS}, compute={"remat": remat})
    # A device has two sequences of 32 tokens; an expert's even share of one is 16, and a quarter
    # more are 20. To the experts and from them in every pass.
    buffer = 2 * 4 * 20 * EMBED * 2
    wire = wires(cfg, fsdp=2, expert=4)[ALL_TO_ALL, ("expert",)]
    assert wire == pytest.approx(3 / 4 * buffer * 2 * passes * LAYERS)


def test_expert_buffer_is_at_most_a_sequence(by_hand) -> None:
    cfg = by_hand({"moe": MoeConfig(experts=4, top_k=4, hidden=64, capacity=3.0)})
    buffer = 2 * 4 * 32 * EMBED * 2
    wire = wires(cfg, fsdp=2, expert=4)[ALL_TO_ALL, ("expert",)]
    assert wire == pytest.approx(3 / 4 * buffer * 2 * 2 * LAYERS)


def test_dropless_experts_gather_and_scatter_tokens(by_hand) -> None:
    cfg = by_hand({"moe": MoeConfig(experts=4, top_k=2, hidden=64)})
    group = 4 * 2 * 32 * EMBED * 2  # tokens of the four devices that share the experts
    found = wires(cfg, fsdp=2, expert=4)
    assert (ALL_TO_ALL, ("expert",)) not in found
    # Forward, tokens are gathered and their results scattered; backward the reverse.
    assert found[ALL_GATHER, ("expert",)] == pytest.approx(3 / 4 * group * 2 * LAYERS)
    assert found[REDUCE_SCATTER, ("expert",)] == pytest.approx(3 / 4 * group * 2 * LAYERS)


def test_fsdp_of_expert_weights_is_within_a_device_s_own_experts(by_hand) -> None:
    attention = 2 * 32 * 32 + 2 * 32 * 8
    one = 3 * 32 * 64  # of the four
    found = wires(by_hand({"moe": EXPERTS}, compute={"remat": "block"}), fsdp=2, expert=4)
    scattered = LAYERS * (attention + one) * 2 + 2 * TABLE * 4
    assert found[REDUCE_SCATTER, ("fsdp",)] == pytest.approx(1 / 2 * scattered)
    # Gradients of experts are whole once scattered; those of all else are summed over the axis.
    sums = LAYERS * attention * 2 / 2 + 2 * TABLE * 4 / 2
    assert found[ALL_REDUCE, ("expert",)] == pytest.approx(2 * 3 / 4 * sums)
    more = wires(
        by_hand(
            {"moe": MoeConfig(experts=4, top_k=2, hidden=64, capacity=1.25, shared=1)},
            compute={"remat": "block"},
        ),
        fsdp=2,
        expert=4,
    )
    assert more[REDUCE_SCATTER, ("fsdp",)] - found[REDUCE_SCATTER, ("fsdp",)] == pytest.approx(
        1 / 2 * LAYERS * 3 * 32 * 64 * 2
    )


# --- against the compiled step -------------------------------------------------------------------
#
# XLA:CPU leaves gathers, scatters and exchanges as they are written, so these are compared kind by
# kind and axis by axis. Not compared:
# - sums over several axes. The metrics' and the global norm's, and in a mixture the router's, are
#   not predicted; they are a few floats, but in a model this small not within 2 % of all.
# - gathers under accumulation: XLA:CPU takes the tables' out of the loop over the parts.
# - gathers of a mixture: its router is no product of matmul.py, and top_k gathers what it sorts.

FOUR = MoeConfig(experts=4, top_k=2, capacity=1.25)
STEPS = {
    "three rings": (
        {"model": LLAMA},
        {"fsdp": 2, "fsdp_2": 2, "fsdp_3": 2},
        [
            (kind, (axis,))
            for kind in (ALL_GATHER, REDUCE_SCATTER)
            for axis in ("fsdp", "fsdp_2", "fsdp_3")
        ],
    ),
    "data x fsdp": (
        {},  # GPT-2's layers: layer norms, biases, learned positions, a tied table
        {"data": 2, "fsdp": 4},
        [(ALL_GATHER, ("fsdp",))],
    ),
    "data x fsdp x tensor": (
        {"model": LLAMA, "compute": {"remat": "block", "loss_chunks": 2}},
        {"data": 2, "fsdp": 2, "tensor": 2},
        [
            *(
                (kind, (axis,))
                for kind in (ALL_GATHER, REDUCE_SCATTER)
                for axis in ("fsdp", "tensor")
            ),
            (ALL_REDUCE, ("data",)),
        ],
    ),
    "accumulation": (
        {"model": LLAMA, "train": {"accumulation": 4}},
        {"data": 2, "fsdp": 2, "tensor": 2},
        [
            (REDUCE_SCATTER, ("fsdp",)),
            (REDUCE_SCATTER, ("tensor",)),
            (ALL_GATHER, ("tensor",)),
            (ALL_REDUCE, ("data",)),
        ],
    ),
    "a ring": (
        {"model": LLAMA, "compute": {"remat": "block"}, "data": {"documents": "mask"}},
        {"data": 2, "context": 4},
        [(PERMUTE, ("context",))],
    ),
    "a ring x tensor": (
        {"model": {**LLAMA, "positions": "alibi"}},
        {"tensor": 2, "context": 4},
        [(PERMUTE, ("context",))],
    ),
    "fsdp x expert": (
        {"model": {**LLAMA, "moe": FOUR}},
        {"fsdp": 2, "expert": 4},
        [(ALL_TO_ALL, ("expert",)), (REDUCE_SCATTER, ("fsdp",)), (ALL_REDUCE, ("expert",))],
    ),
    "stages, with rounds, remat, two steps": (
        {
            "model": {**LLAMA, "layers": 8},
            "compute": {"microbatches": 4, "rounds": 2, "remat": "block"},
            "train": {"accumulation": 2},
        },
        {"stage": 2, "fsdp": 2, "tensor": 2},
        [
            (PERMUTE, ("stage",)),
            (ALL_GATHER, ("stage",)),
            (REDUCE_SCATTER, ("stage",)),
            (ALL_GATHER, ("fsdp",)),
            (REDUCE_SCATTER, ("fsdp",)),
            (ALL_GATHER, ("tensor",)),
            (REDUCE_SCATTER, ("tensor",)),
        ],
    ),
    "stages x expert": (
        {"model": {**LLAMA, "layers": 4, "moe": FOUR}},
        {"data": 2, "stage": 2, "expert": 2},
        [(PERMUTE, ("stage",)), (ALL_TO_ALL, ("expert",)), (ALL_REDUCE, ("data",))],
    ),
    "shared experts x tensor": (
        {"model": {**LLAMA, "moe": MoeConfig(experts=4, top_k=2, shared=1)}},
        {"fsdp": 4, "tensor": 2},
        [(REDUCE_SCATTER, ("tensor",)), (ALL_GATHER, ("tensor",))],
    ),
}


@pytest.fixture(scope="module")
def compare(tiny_config, quick_compile):
    """Wire bytes of the compiled step, and those predicted, by kind and axes; each step once."""
    done = {}

    def seen_and_expected(sections, sizes):
        key = repr((sections, sizes))
        if key not in done:
            sections = {**sections, "mesh": {"stage": sizes.get("stage", 1)}}
            cfg, sizes = tiny_config(**sections), sizes_of(**sizes)
            types = make_mesh(MeshConfig()).axis_types
            devices = np.array(jax.devices()[: math.prod(sizes.values())])
            mesh = jax.sharding.Mesh(devices.reshape(tuple(sizes.values())), AXES, types)
            with jax.set_mesh(mesh):
                init_fn = lambda key: decoder.init(cfg.model, key)
                step = compile_step(
                    cfg,
                    objective.training_loss(cfg, eos_id=0),
                    sharding.abstract(lambda: create_state(cfg, init_fn)),
                    objective.abstract_batch(cfg),
                )
                attention = objective.attention_backends(cfg)
            found = aot.program_collectives(step.as_text(), mesh.shape)
            predicted = collectives.step_collectives(cfg, sizes, attention)
            both = collectives.by_axes(found), collectives.by_axes(predicted)
            done[key] = tuple({k: wire for k, (_, wire) in table.items()} for table in both)
        return done[key]

    return seen_and_expected


QUICK = ("data x fsdp x tensor",)
OFTEN = (
    "accumulation",
    "stages x expert",
    "a ring x tensor",
    "stages, with rounds, remat, two steps",
)
SLOW, EXHAUSTIVE = [pytest.mark.slow], [pytest.mark.exhaustive]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[] if n in QUICK else SLOW + ([] if n in OFTEN else EXHAUSTIVE))
        for n in STEPS
    ],
)
def test_compiled_step_has_the_predicted_communication(compare, name) -> None:
    sections, sizes, compared = STEPS[name]
    seen, expected = compare(sections, sizes)
    for key in compared:
        assert expected[key] == pytest.approx(seen[key], rel=0.02), key


@pytest.mark.parametrize(
    "name",
    [
        "data x fsdp x tensor",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("three rings", "a ring")),
    ],
)
def test_compiled_step_has_no_large_unpredicted_communication(compare, name) -> None:
    sections, sizes, _ = STEPS[name]
    seen, expected = compare(sections, sizes)
    surplus = {key: wire - expected.get(key, 0) for key, wire in seen.items()}
    total = sum(expected.values())
    assert {key: wire for key, wire in surplus.items() if wire > 0.02 * total} == {}
    assert total == pytest.approx(sum(seen.values()), rel=0.02)


@pytest.mark.parametrize("key", [(REDUCE_SCATTER, ("fsdp",)), (ALL_REDUCE, ("data",))])
@pytest.mark.slow
def test_gradient_of_tied_table_is_communicated_for_each_use(compare, key) -> None:
    seen, expected = compare(*STEPS["data x fsdp"][:2])
    assert expected[key] == pytest.approx(seen[key], rel=0.02)


@pytest.mark.slow
def test_expert_weights_are_gathered_as_often_as_in_compiled_step(compare) -> None:
    seen, expected = compare(*STEPS["fsdp x expert"][:2])
    assert expected[ALL_GATHER, ("fsdp",)] == pytest.approx(seen[ALL_GATHER, ("fsdp",)], rel=0.02)
