"""The pipeline: the order of its layers, and its schedule. tests/test_invariance.py trains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.parallel import pipeline, sharding

pytestmark = pytest.mark.usefixtures("quick_compile")

ROWS = 16


def test_with_one_round_layers_lie_in_their_own_order(on_mesh) -> None:
    with on_mesh(stage=4):
        assert pipeline.order(8, 1).tolist() == list(range(8))


def test_with_rounds_a_stage_has_every_so_many_th_stretch(on_mesh) -> None:
    """Of 8 layers in 2 stages and 2 rounds: stretches 0 and 2 here, 1 and 3 there."""
    with on_mesh(stage=2):
        assert pipeline.order(8, 2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


@pytest.mark.parametrize(("rounds", "microbatches"), [(1, 4), (1, 8), (2, 4), (2, 8)])
def test_each_microbatch_meets_every_layer_once_and_in_turn(on_mesh, rounds, microbatches) -> None:
    """A layer adds its number to half of what it gets, so no other order gives the same."""
    periods, length, width = 8, 4, 2
    with on_mesh(data=2, stage=4) as mesh:
        x_BTD = np.random.default_rng(0).normal(size=(ROWS, length, width)).astype(np.float32)
        x_ND = jax.device_put(x_BTD.reshape(-1, width), sharding.spec("tokens", "embed"))
        ids_B = jax.device_put(np.arange(ROWS, dtype=np.float32), sharding.spec("batch"))
        numbers = pipeline.order(periods, rounds)
        blocks = jax.device_put(np.float32(numbers), jax.NamedSharding(mesh, jax.P("stage")))

        def stretch(blocks, x_nD, first, ids_b):
            def layer(x_nD, given):
                number, place = given
                rows = jax.P(jax.typeof(x_nD).sharding.spec[0])
                per_row = jnp.repeat(ids_b, length, out_sharding=rows)
                return x_nD * 0.5 + 3 * number + per_row[:, None], (place, number)

            places = first + jnp.arange(len(blocks))
            return jax.lax.scan(layer, x_nD, (blocks, places))

        run = jax.jit(lambda *a: pipeline.run(stretch, *a, rounds, microbatches))
        got, (place, number) = jax.device_get(run(blocks, x_ND, ids_B))
    want = x_BTD.reshape(-1, width)
    for k in range(periods):
        want = want * 0.5 + 3 * k + np.repeat(np.arange(ROWS), length)[:, None]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    # Sums over microbatches, by period in the model's order; idle ticks add nothing.
    assert place.tolist() == [microbatches * k for k in range(periods)]
    assert number.tolist() == place.tolist()
