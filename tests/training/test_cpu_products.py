"""The compiled step on a CPU: products that are fast, no idle collectives, no copied state."""

import re

import jax
import pytest

from gptjax.config import Config
from gptjax.kernels import cpu
from gptjax.model import decoder
from gptjax.training import objective
from gptjax.training.step import compile_step, create_state

PRODUCT = re.compile(r"= (\w+)\[[\d,]+\]\S* dot\(.*lhs_contracting_dims=\{(\d+)\}.*?=\{(\d+)\}")


def compiled(cfg: Config) -> str:
    state = jax.eval_shape(lambda: create_state(cfg, lambda k: decoder.init(cfg.model, k)))
    loss = objective.training_loss(cfg, 0)
    return compile_step(cfg, loss, state, objective.abstract_batch(cfg)).as_text()


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 2, 2)])
def test_a_step_in_bfloat16_has_fast_products_the_loss_kernel_and_no_idle_collectives(
    on_mesh, tiny_config, axes
) -> None:
    cfg = tiny_config(
        model={"vocab_size": 512, "embed": 64, "heads": 2},
        compute={"dtype": "bfloat16", "loss_chunks": 2},
    )
    with on_mesh(*axes):
        program = compiled(cfg)
    assert ("gptjax_loss" in program) == (cpu.ready() and axes[-1] == 1)
    assert bool(re.search(r" (all-gather|reduce-scatter)\(", program)) == (axes != (1, 1, 1))
    products = [found for line in program.splitlines() if (found := PRODUCT.search(line))]
    assert len(products) >= 15
    assert {found.groups()[1:] for found in products} == {("1", "0")}
    if jax.__version_info__ >= (0, 12):  # before, every product has a float32 result
        results = [found[1] for found in products]
        assert set(results) == {"bf16", "f32"}
        assert results.count("f32") == 2  # the logits, and the gradient of the output layer


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="XLA copies it there all the same")
@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_a_step_writes_the_optimizers_state_in_place(on_mesh, tiny_config, name) -> None:
    with on_mesh(1, 1, 1):
        program = compiled(tiny_config(optim={"name": name}))
    state = rf"s_opt_state__{name}\w*"
    assert len(set(re.findall(rf"%({state})[\w.]* = f32\[\d[\d,]*\]", program))) >= 8
    assert not re.findall(rf"= f32\[\d[\d,]*\]\S* copy\(%{state}", program)
    # The table is computed from the old state itself, not from a new one in an array of its own.
    assert re.search(rf" fusion\(%s_params__embed[^)]*%{state}__embed", program)
