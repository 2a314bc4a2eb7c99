"""Attention kernels that JAX ships: splash attention for TPUs, and cuDNN's for GPUs.

Shapes: B sequences, T positions, H query heads, K key heads, C head_dim; in lower case, one
device's share.
"""

import functools
from typing import Any

import jax
import numpy as np
from jax import lax

from gptjax.config import ModelConfig
from gptjax.config.registry import ATTENTION_BACKENDS
from gptjax.model.attention.backends import Backend, Inputs, LocalBackend, Requirements, Sizes
from gptjax.parallel import sequence, sharding
from gptjax.parallel.matmul import PRODUCT
from gptjax.parallel.mesh import abstract_mesh
from gptjax.runtime.hardware import Target


@ATTENTION_BACKENDS.register("splash")
class Splash(Backend):
    """JAX's splash attention for TPU: block-sparse, never materialises the scores.

    Where sequences are split over the context axis, keys are gathered over it, and each device
    computes the blocks that its own queries see.
    """

    platforms = ("tpu",)
    features = frozenset({"segments", "window", "grouped", "soft_cap", "context"})
    length_multiple = 128
    auto_rank = 10

    def attend(self, cfg: ModelConfig, inputs: Inputs) -> jax.Array:
        """Causal attention, [B, T, H, C]."""
        from jax.experimental.pallas.ops.tpu.splash_attention import (
            splash_attention_kernel as kernel,
        )

        segments_BT, scale = inputs.tokens.segments_BT, inputs.scale
        _, t, h, _ = inputs.q_BTHC.shape
        attend, mask_specs = _splash_kernel(cfg, t, h, inputs.window)

        def local(
            attend: Any,
            q_bthC: jax.Array,
            k_btkC: jax.Array,
            v_btkC: jax.Array,
            segments_bt: jax.Array | None,
        ) -> jax.Array:
            segments = None
            if segments_bt is not None:
                segments = kernel.SegmentIds(segments_bt, _gather_natural(segments_bt, t))
            keys = (_gather_natural(x, t).swapaxes(1, 2) for x in (k_btkC, v_btkC))
            q_bhtC = (q_bthC * scale).swapaxes(1, 2)
            return jax.vmap(attend)(q_bhtC, *keys, segments).swapaxes(1, 2)

        heads = sharding.spec("batch", "seq", "heads", None)
        tokens = None if segments_BT is None else sharding.spec("batch", "seq")
        return jax.shard_map(
            local,
            in_specs=(mask_specs, heads, heads, heads, tokens),
            out_specs=heads,
            check_vma=False,
        )(attend, inputs.q_BTHC, inputs.k_BTKC, inputs.v_BTKC, segments_BT)


def _splash_kernel(cfg: ModelConfig, t: int, heads: int, window: int | None) -> tuple[Any, Any]:
    """The kernel for one sequence of length t, its mask's blocks on the mesh, and their specs."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    local_heads = heads // sharding.axis_size("heads")
    parts = sharding.axis_size("seq")
    mask = _by_blocks(masks.CausalMask if window is None else masks.LocalMask, window)(
        (t, t), *(() if window is None else ((window - 1, 0), 0))
    )
    mask.q_sequence = sequence.zigzag_positions(t).astype(np.int32)
    # Blocks of 512: the default of 128 leaves the matrix unit idle between them.
    size = max(s for s in (512, 384, 256, 128) if t // parts % s == 0)
    forward = ("block_q", "block_kv", "block_kv_compute")
    backward = ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    block_sizes: dict[str, Any] = dict.fromkeys(forward + backward, size)
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * local_heads),
        block_sizes=kernel.BlockSizes(**block_sizes),
        attn_logits_soft_cap=cfg.attention_soft_cap or None,
        head_shards=1,
        q_seq_shards=parts,
        residual_checkpoint_name=PRODUCT,  # so that remat=dots runs the forward pass once
    )
    # Each device has the mask's blocks for its queries. Within a stage of a pipeline, JAX would
    # refuse the mesh itself.
    mesh = abstract_mesh(**jax.sharding.get_abstract_mesh().shape)
    specs = attend.manual_sharding_spec(jax.NamedSharding(mesh, sharding.spec(None, "seq")))
    return jax.tree.map(jax.sharding.reshard, attend, specs), specs


def _by_blocks(base: Any, window: int | None) -> Any:
    """A mask of splash attention that computes no block of which all or nothing is seen.

    The kernel asks the host for each block, and for each column: all of T^2 elements, several times
    (70 s at 131,072 tokens).
    """

    class ByBlocks(base):  # type: ignore[misc]
        def __getitem__(self, at: tuple[slice, slice]) -> np.ndarray:
            queries, (first, end, _) = self.q_sequence[at[0]], at[1].indices(self.shape[1])
            if end - first == 1:  # compared along the queries, as they lie in memory
                seen = queries >= first
                seen = seen if window is None else seen & (queries < first + window)
                return np.asarray(seen[:, None])
            shape = (len(queries), end - first)
            least, most = int(queries.min()), int(queries.max())
            hidden = -1 if window is None else most - window  # the last key before any window
            seen_from = -1 if window is None else least - window
            if end - 1 <= least and first > hidden:
                return _constant(shape, True)
            if first > most or end - 1 <= seen_from:
                return _constant(shape, False)
            return np.asarray(super().__getitem__(at))

    return ByBlocks


@functools.lru_cache(maxsize=64)
def _constant(shape: tuple[int, int], value: bool) -> np.ndarray:
    return np.full(shape, value)


def _gather_natural(a_bt: jax.Array, length: int) -> jax.Array:
    """Whole sequences in natural order from the parts of the context axis, in a shard_map."""
    if a_bt.shape[1] == length:
        return a_bt
    return sequence.from_zigzag(lax.all_gather(a_bt, "context", axis=1, tiled=True))


_BTNH = 0  # as JAX numbers cuDNN's layouts


@ATTENTION_BACKENDS.register("cudnn")
class Cudnn(LocalBackend):
    """cuDNN's flash attention for GPU.

    Packed documents are masked by a bias of [b, 1, T, T], which takes memory in place of the scores
    of every head, and skips nothing. The sizes are those that cuDNN 9.23 and 9.26 have graphs for:
    heads of up to 128 from the A100 on, on Hopper of up to 256, on the B200 and its kin of 256 too
    (tests/plan/test_cudnn_graphs.py asks).
    """

    platforms = ("gpu",)
    features = frozenset({"segments", "window", "grouped"})
    dtypes = ("bfloat16",)
    length_multiple = 2
    head_multiple = 8
    auto_rank = 20

    def refusal(self, need: Requirements, sizes: Sizes, target: Target) -> str | None:
        if why := super().refusal(need, sizes, target):
            return why
        if need.segments and need.window and jax.__version_info__ < (0, 12):
            return "does not support segments in a window before JAX 0.12"
        capability, head = target.capability or (8, 0), sizes.head
        if capability < (8, 0):
            return "needs an A100 or newer"
        wide = {9: range(136, 257, 8), 10: (256,)}.get(capability[0], ())
        if head > 128 and head not in wide:
            also = {9: "256", 10: "128, or of 256"}.get(capability[0], "128")
            return f"needs heads of at most {also}, not {head}"
        return None

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
        mask_b1TT = None
        if segments_bT is not None:
            mask_b1TT = (segments_bT[:, :, None] == segments_bT[:, None, :])[:, None]
        return jax.nn.dot_product_attention(
            q_bThC,
            k_bTkC,
            v_bTkC,
            mask=mask_b1TT,
            scale=scale,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )


def is_cudnn_forward(primitive: Any, *_: Any, layout: int = -1, **__: Any) -> bool:
    """A remat policy: cuDNN's output and its log-sum-exp are kept, so that it runs once.

    Not those of a part of the keys, which the ring asks for in another layout.
    """
    return primitive.name == "dot_product_attention_fwd_wrapper" and layout == _BTNH
