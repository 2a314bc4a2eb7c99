"""Gradients of weights that permutes scatter, beside those that a reduce-scatter does.

Shapes: N tokens, D embed, F features.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.parallel import matmul, sharding
from gptjax.parallel.sharding import spec

N, D, F = 48, 24, 48
# The last matrix of the feed-forward is split over fsdp by rows, that of attention by columns.
WEIGHTS = {
    "up": ((D, F), ("w_embed", "mlp")),
    "down": ((F, D), ("w_mlp", None)),
    "output": ((F, D), ("mlp", "w_embed")),
}


@pytest.fixture
def gradients(on_mesh, monkeypatch):
    """The gradients of WEIGHTS on a mesh, and the text of their program."""

    def compute(ring_tokens, *mesh):
        monkeypatch.setattr(sharding, "ring_tokens", lambda: ring_tokens)
        normal = np.random.default_rng(0).standard_normal
        values = {name: normal(shape, np.float32) for name, (shape, _) in WEIGHTS.items()}
        x_ND, factors_ND = normal((N, D), np.float32), normal((N, D), np.float32)
        with on_mesh(*mesh) as devices:
            layout = matmul.choose_layout(N)
            tokens = lambda x: jax.sharding.reshard(jnp.asarray(x), spec(layout.axis, "embed"))

            def total(weights):
                up = (weights["up"],)
                (h_NF,) = matmul.column_parallel(tokens(x_ND), up, "mlp", layout)
                y_ND = matmul.row_parallel(h_NF, weights["down"], layout)
                y_ND += matmul.row_parallel(jnp.tanh(h_NF), weights["output"], layout)
                return (y_ND * tokens(factors_ND)).sum()

            places = {
                n: jax.NamedSharding(devices, spec(*axes)) for n, (_, axes) in WEIGHTS.items()
            }
            weights = jax.device_put(values, places)
            step = jax.jit(jax.grad(total)).lower(weights).compile()
            return jax.device_get(step(weights)), step.as_text()

    return compute


# (data, fsdp, tensor): two devices in the ring, four, eight, and beside a tensor axis.
@pytest.mark.parametrize("mesh", [(4, 2, 1), (2, 4, 1), (1, 8, 1), (1, 4, 2)])
def test_permutes_scatter_the_gradient_that_a_reduce_scatter_does(gradients, mesh) -> None:
    found, text = gradients(1, *mesh)
    expected, plain = gradients(0, *mesh)
    assert text.count("collective-permute") > plain.count("collective-permute")
    for name in WEIGHTS:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-4)


def test_few_tokens_are_scattered_without_permutes(gradients) -> None:
    devices = 8
    _, enough = gradients(N // devices, 1, devices, 1)
    _, few = gradients(N // devices + 1, 1, devices, 1)
    assert "collective-permute" in enough
    assert "collective-permute" not in few
