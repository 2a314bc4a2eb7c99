"""Kernels of attention that JAX ships: splash for TPUs, cuDNN's for GPUs.

Shapes: B batch, T queries, H query heads, K key heads, C head_dim.
"""

import jax
import numpy as np
from jax import lax

from gptjax.parallel import sequence, sharding
from gptjax.parallel.mesh import abstract_mesh


def splash(cfg, q_BTHC, k_BTKC, v_BTKC, positions_BT, segments_BT, window):
    """JAX's splash attention for TPU: block-sparse, never holds the scores.

    Where sequences are split over the context axis, each device has the keys of whole sequences for
    its own queries, and the kernel's blocks are those that these see.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    _, t, h, c = q_BTHC.shape
    h, parts = h // sharding.axis_size("heads"), sharding.axis_size("seq")
    one = (
        masks.CausalMask((t, t)) if window is None else masks.LocalMask((t, t), (window - 1, 0), 0)
    )
    one.q_sequence = sequence.places(t).astype(np.int32)
    # Blocks of 512: the default of 128 leaves the matrix unit idle between them.
    size = max(s for s in (512, 384, 256, 128) if t // parts % s == 0)
    forward = ("block_q", "block_kv", "block_kv_compute")
    backward = ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    attend = kernel.make_splash_mha(
        masks.MultiHeadMask([one] * h),
        block_sizes=kernel.BlockSizes(**dict.fromkeys(forward + backward, size)),
        attn_logits_soft_cap=cfg.attention_soft_cap or None,
        head_shards=1,
        q_seq_shards=parts,
    )
    # Each device's blocks of the mask lie with its queries. Within a stage of a pipeline, the mesh
    # itself would be refused.
    mesh = abstract_mesh(**jax.sharding.get_abstract_mesh().shape)
    mask_specs = attend.manual_sharding_spec(jax.NamedSharding(mesh, sharding.spec(None, "seq")))
    attend = jax.tree.map(jax.sharding.reshard, attend, mask_specs)

    def local(attend, q_BTHC, k_BTKC, v_BTKC, segments_BT):
        segments = None
        if segments_BT is not None:
            segments = kernel.SegmentIds(segments_BT, _in_order(segments_BT, t))
        keys = (_in_order(x, t).swapaxes(1, 2) for x in (k_BTKC, v_BTKC))
        q_BHTC = (q_BTHC * c**-0.5).swapaxes(1, 2)
        return jax.vmap(attend)(q_BHTC, *keys, segments).swapaxes(1, 2)

    heads = sharding.spec("batch", "seq", "heads", None)
    rows = None if segments_BT is None else sharding.spec("batch", "seq")
    return jax.shard_map(
        local,
        in_specs=(mask_specs, heads, heads, heads, rows),
        out_specs=heads,
        check_vma=False,
    )(attend, q_BTHC, k_BTKC, v_BTKC, segments_BT)


def _in_order(a_BT: jax.Array, length: int) -> jax.Array:
    """Inside an island: whole sequences in their own order, from the parts of the context axis."""
    if a_BT.shape[1] == length:
        return a_BT
    return sequence.in_order(lax.all_gather(a_BT, sharding.RULES["seq"], axis=1, tiled=True))


def cudnn(q_BTHC, k_BTKC, v_BTKC, segments_BT, window):
    """cuDNN's flash attention for GPU. It has no segment mask."""
    assert segments_BT is None
    local = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q_BTHC, k_BTKC, v_BTKC, is_causal=True, local_window_size=local, implementation="cudnn"
    )
