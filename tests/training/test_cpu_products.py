"""The compiled step on a CPU: bfloat16 products in the only form that XLA:CPU is fast in."""

import re

import jax
import pytest

from gptjax.model import decoder
from gptjax.training import objective
from gptjax.training.step import compile_step, create_state

PRODUCT = re.compile(r"= (\w+)\[[\d,]+\]\S* dot\(.*lhs_contracting_dims=\{(\d+)\}.*?=\{(\d+)\}")


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 2)])
def test_operands_of_bfloat16_products_are_in_row_major_order(on_mesh, tiny_config, axes) -> None:
    cfg = tiny_config(
        model={"vocab_size": 512, "embed": 64, "heads": 2},
        compute={"dtype": "bfloat16", "loss_chunks": 2},
    )
    with on_mesh(*axes):
        state = jax.eval_shape(lambda: create_state(cfg, lambda k: decoder.init(cfg.model, k)))
        loss = objective.training_loss(cfg, 0)
        step = compile_step(cfg, loss, state, objective.abstract_batch(cfg))
    products = [found for line in step.as_text().splitlines() if (found := PRODUCT.search(line))]
    assert len(products) >= 15
    assert {found.groups()[1:] for found in products} == {("1", "0")}
    if jax.__version_info__ >= (0, 12):  # before, every product has a float32 result
        results = [found[1] for found in products]
        assert set(results) == {"bf16", "f32"}
        assert results.count("f32") == 2  # the logits, and the gradient of the output layer
