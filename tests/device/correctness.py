"""Losses and gradients on the device against float32 on the CPU: backends, dtypes, families."""

from typing import Any

import jax
import numpy as np
from rows import Rows
from workloads import EOS, changed, tiny, windows

from gptjax.config import Config
from gptjax.config.registry import ATTENTION_BACKENDS
from gptjax.errors import ConfigError
from gptjax.model import decoder
from gptjax.parallel import arrays, sharding
from gptjax.parallel.mesh import make_mesh
from gptjax.training import objective

# Of the relative error of the loss and of all gradients together. float32 sums in another order;
# bfloat16 has 8 bits, and rounds every activation.
BOUNDS = {"float32": (1e-5, 1e-4), "bfloat16": (5e-3, 5e-2)}


def loss_and_grads(cfg: Config, params: Any, device: jax.Device) -> tuple[float, Any]:
    """The mean loss of the first batch and its gradients, in numpy."""
    exact = cfg.compute.dtype == "float32"
    jax.config.update("jax_default_matmul_precision", "float32" if exact else None)
    with jax.set_mesh(make_mesh(cfg.mesh, [device])):
        layout = sharding.abstract(lambda: decoder.init(cfg.model, jax.random.key(0)))
        params = jax.tree.map(lambda a, like: jax.device_put(a, like.sharding), params, layout)
        batch = arrays.global_batch(windows(cfg, 0), cfg.train.batch)
        loss = objective.training_loss(cfg, EOS)
        mean = lambda tree: loss(tree, batch, None)[0] / cfg.train.batch_tokens
        value, grads = jax.jit(jax.value_and_grad(mean))(params)
        return float(value), jax.device_get(grads)


def initial(cfg: Config) -> Any:
    """Random parameters, in numpy."""
    with jax.set_mesh(make_mesh(cfg.mesh, jax.devices("cpu")[:1])):
        return jax.device_get(jax.jit(lambda key: decoder.init(cfg.model, key))(jax.random.key(1)))


def error(found: Any, wanted: Any) -> float:
    """The norm of the difference of two trees over that of the second."""
    square = lambda tree: sum(float(np.square(np.float64(a)).sum()) for a in jax.tree.leaves(tree))
    difference = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), found, wanted)
    return (square(difference) / square(wanted)) ** 0.5


def run(rows: Rows, *, toy: bool) -> None:
    device = jax.devices()[0]
    rows.add("device", device.device_kind)
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "gpt2": ("gpt2", {}),
        "llama, grouped keys": ("llama", {}),
        "llama, documents masked": ("llama", {"documents": "mask"}),
        "mixtral": ("mixtral", {}),
    }
    if toy:
        cases = {"mixtral, documents masked": ("mixtral", {"documents": "mask"})}
    for name, (family, data) in cases.items():
        reference = changed(tiny(family, dtype="float32", attention="reference"), data=data)
        params = initial(reference)
        want_loss, want_grads = loss_and_grads(reference, params, jax.devices("cpu")[0])
        for dtype in BOUNDS:
            for backend in ATTENTION_BACKENDS.names():
                cfg = changed(reference, compute={"dtype": dtype, "attention": backend})
                try:
                    loss, grads = loss_and_grads(cfg, params, device)
                except ConfigError:
                    continue  # refused by name: not for this device, dtype or mask
                loss_bound, grads_bound = BOUNDS[dtype]
                case = f"{name}, {backend}, {dtype}"
                rows.add(f"{case}: loss", abs(loss / want_loss - 1), bound=loss_bound)
                rows.add(f"{case}: gradients", error(grads, want_grads), bound=grads_bound)
