"""The pipeline: its schedule by itself, the order of its layers, and the program that runs it.

tests/test_invariance.py trains with it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.parallel import pipeline, sharding
from gptjax.parallel.pipeline import Schedule

pytestmark = pytest.mark.usefixtures("quick_compile")

ROWS = 16


# --- the schedule, without devices ---------------------------------------------------------------


def table(sizes):
    """The work of every stage at every tick: (microbatch, virtual stage), or None where idle."""
    ticks, stages = np.arange(sizes.ticks)[:, None], np.arange(sizes.stages)[None]
    work = pipeline.schedule(ticks, stages, sizes)
    assert all(isinstance(field, np.ndarray) for field in work)
    return [
        [
            (int(work.microbatch[t, s]), int(work.virtual_stage[t, s]))
            if work.active[t, s]
            else None
            for s in range(sizes.stages)
        ]
        for t in range(sizes.ticks)
    ]


def test_schedule_with_one_round_fills_runs_and_drains():
    """Two stages, four microbatches: the second stage follows the first by a tick."""
    assert table(Schedule(stages=2, microbatches=4, rounds=1)) == [
        [(0, 0), None],
        [(1, 0), (0, 1)],
        [(2, 0), (1, 1)],
        [(3, 0), (2, 1)],
        [None, (3, 1)],
    ]


def test_schedule_with_two_rounds_interleaves_them_by_groups_of_microbatches():
    """Two stages, two rounds: a group passes virtual stages 0 and 1, then 2 and 3."""
    assert table(Schedule(stages=2, microbatches=4, rounds=2)) == [
        [(0, 0), None],
        [(1, 0), (0, 1)],
        [(0, 2), (1, 1)],
        [(1, 2), (0, 3)],
        [(2, 0), (1, 3)],
        [(3, 0), (2, 1)],
        [(2, 2), (3, 1)],
        [(3, 2), (2, 3)],
        [None, (3, 3)],
    ]


SIZES = [Schedule(s, g * s, r) for s in (1, 2, 3, 4) for g in (1, 2, 3) for r in (1, 2, 3)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_microbatch_passes_every_virtual_stage_once_in_order(sizes):
    """And each on the stage that has it, a tick after the one before it on the stage before."""
    passed = {microbatch: [] for microbatch in range(sizes.microbatches)}
    for tick, row in enumerate(table(sizes)):
        for stage, work in enumerate(row):
            if work is not None:
                passed[work[0]].append((tick, stage, work[1]))
    count = sizes.stages * sizes.rounds
    for steps in passed.values():
        first = steps[0][0]
        assert steps == [(first + i, i % sizes.stages, i) for i in range(count)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_stage_idles_only_while_the_pipeline_fills_and_drains(sizes):
    """Its number of ticks before its work, and in all one less than there are stages."""
    for stage, column in enumerate(zip(*table(sizes), strict=True)):
        idle = [tick for tick, work in enumerate(column) if work is None]
        working = range(stage, stage + sizes.work_ticks)
        assert idle == [tick for tick in range(sizes.ticks) if tick not in working]
    assert sizes.ticks == sizes.work_ticks + sizes.stages - 1


# --- the order of layers in memory ---------------------------------------------------------------


def test_layers_are_in_model_order_with_one_round(on_mesh) -> None:
    with on_mesh(stage=4):
        assert pipeline.order(8, 1).tolist() == list(range(8))


def test_a_stage_has_its_virtual_stages_one_after_another_in_memory(on_mesh) -> None:
    """8 layers, 2 stages, 2 rounds: stage 0 has virtual stages 0 and 2, stage 1 has 1 and 3."""
    with on_mesh(stage=2):
        assert pipeline.order(8, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


# --- the program ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("rounds", "microbatches"), [(1, 4), (1, 8), (2, 4), (2, 8)])
def test_every_microbatch_passes_every_layer_once_in_order(on_mesh, rounds, microbatches) -> None:
    """A layer adds its number to half of its input, so no other order gives the same."""
    periods, length, width = 8, 4, 2
    with on_mesh(data=2, stage=4) as mesh:
        x_BTD = np.random.default_rng(0).normal(size=(ROWS, length, width)).astype(np.float32)
        x_ND = jax.device_put(x_BTD.reshape(-1, width), sharding.spec("tokens", "embed"))
        ids_B = jax.device_put(np.arange(ROWS, dtype=np.float32), sharding.spec("batch"))
        numbers = pipeline.order(periods, rounds)
        blocks = jax.device_put(np.float32(numbers), jax.NamedSharding(mesh, jax.P("stage")))

        def apply_periods(blocks, x_nD, numbers, ids_b):
            def layer(x_nD, given):
                parameter, number = given
                tokens = jax.P(jax.typeof(x_nD).sharding.spec[0])
                ids_n = jnp.repeat(ids_b, length, out_sharding=tokens)
                return x_nD * 0.5 + 3 * parameter + ids_n[:, None], (number, parameter)

            return jax.lax.scan(layer, x_nD, (blocks, numbers))

        run = jax.jit(lambda *a: pipeline.run(apply_periods, *a, rounds, microbatches))
        got, (number, parameter) = jax.device_get(run(blocks, x_ND, ids_B))
    want = x_BTD.reshape(-1, width)
    for k in range(periods):
        want = want * 0.5 + 3 * k + np.repeat(np.arange(ROWS), length)[:, None]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    # Sums over microbatches, by period in the model's order; idle ticks add nothing.
    assert number.tolist() == [microbatches * k for k in range(periods)]
    assert parameter.tolist() == number.tolist()
