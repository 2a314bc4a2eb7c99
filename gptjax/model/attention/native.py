"""Causal attention on CPUs by gptjax's own kernel, forward and backward (kernels/cpu_flash.h).

Shapes: b sequences, T queries, h query heads, k key heads, C head_dim; one device's share.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config.registry import ATTENTION_BACKENDS
from gptjax.kernels import cpu
from gptjax.model.attention.backends import LocalBackend, Requirements, Sizes
from gptjax.runtime.hardware import Target


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(
    q_bThC: jax.Array,
    k_bTkC: jax.Array,
    v_bTkC: jax.Array,
    segments_bT: jax.Array,
    window: int | None,
    scale: float,
) -> jax.Array:
    return cpu.flash(q_bThC, k_bTkC, v_bTkC, segments_bT, window, scale)[0]


def _attend_fwd(*args: Any) -> tuple[jax.Array, Any]:
    results = cpu.flash(*args)
    return results[0], (args[:4], results)


def _attend_bwd(
    window: int | None, scale: float, residuals: Any, dy_bThC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    inputs, results = residuals
    return *cpu.flash_gradients(inputs, results, dy_bThC, window, scale), None


_attend.defvjp(_attend_fwd, _attend_bwd)


@ATTENTION_BACKENDS.register("native")
class Native(LocalBackend):
    """The kernel on each device; where there is no C compiler it is not to be had."""

    platforms = ("cpu",)
    features = frozenset({"segments", "window", "grouped"})
    head_multiple = cpu.WIDTH
    auto_rank = 25

    def refusal(self, need: Requirements, sizes: Sizes, target: Target) -> str | None:
        """As `Backend.refusal`, or why the kernels could not be compiled."""
        return super().refusal(need, sizes, target) or cpu.why_not()

    def attend_local(
        self,
        q_bThC: jax.Array,
        k_bTkC: jax.Array,
        v_bTkC: jax.Array,
        segments_bT: jax.Array | None,
        window: int | None,
        scale: float,
    ) -> jax.Array:
        """Causal attention on one device's share, [b, T, h, C]."""
        if segments_bT is None:
            segments_bT = jnp.zeros(q_bThC.shape[:2], jnp.int32)
        return _attend(q_bThC, k_bTkC, v_bTkC, segments_bT, window, scale)
