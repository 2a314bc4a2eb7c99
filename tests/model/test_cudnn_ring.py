"""The ring of cuDNN's kernels on CPUs, with arithmetic that stands in for each kernel.

How cuDNN is asked is in the programs for GPUs (tests/plan/test_gpu_programs.py).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from both_passes import assert_same, attend_on, make, segments_of

from gptjax.model.attention import cudnn_ring
from gptjax.model.attention.backends import Requirements, Sizes, choose
from gptjax.runtime.hardware import Target

pytestmark = pytest.mark.usefixtures("quick_compile")

LENGTH = 64


def scores(q_bhSC, k_bhSC, seen_b1SS, scale, causal):
    score_bhSS = jnp.einsum("bhqc,bhkc->bhqk", q_bhSC, k_bhSC) * scale
    if seen_b1SS is not None:
        score_bhSS = jnp.where(seen_b1SS, score_bhSS, -1e30)  # cuDNN adds a bias
    triangle = np.tri(*score_bhSS.shape[2:], dtype=bool)
    return jnp.where(triangle, score_bhSS, -1e30) if causal else score_bhSS


def for_each_query_head(k_bkSC, heads):
    return jnp.repeat(k_bkSC, heads // k_bkSC.shape[1], axis=1)


def forward(q, key, seen, scale, *, causal=False):
    k, v = (for_each_query_head(x, q.shape[1]) for x in key)
    score = scores(q, k, seen, scale, causal)
    lse = jax.nn.logsumexp(score, axis=-1)
    return jnp.exp(score - lse[..., None]) @ v, lse


def backward(query, key, seen, scale, *, causal=False):
    (q, out, lse, do), (k, v) = query, key
    b, kv_heads, s, c = k.shape
    keys, values = (for_each_query_head(x, q.shape[1]) for x in (k, v))
    p = jnp.exp(scores(q, keys, seen, scale, causal) - lse[..., None])
    delta = (do * out).sum(-1, keepdims=True)
    ds = p * (do @ values.swapaxes(2, 3) - delta) * scale
    of_keys = lambda x: x.reshape(b, kv_heads, -1, s, c).sum(2)
    return ds @ keys, of_keys(ds.swapaxes(2, 3) @ q), of_keys(p.swapaxes(2, 3) @ do)


@pytest.mark.parametrize("context", [2, 4])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("segments", [None, segments_of(LENGTH)], ids=["whole", "documents"])
def test_equals_the_reference_on_one_device(on_mesh, monkeypatch, context, kv_heads, segments):
    monkeypatch.setattr(cudnn_ring, "forward", forward)
    monkeypatch.setattr(cudnn_ring, "backward", backward)
    arrays = make(LENGTH, heads=4, kv_heads=kv_heads)
    want = attend_on(on_mesh(), arrays, "reference", segments)
    got = attend_on(on_mesh(context=context), arrays, "cudnn_ring", segments)
    assert_same(got, want, tolerance=1e-5)


@pytest.mark.parametrize(
    ("need", "sizes", "chosen"),
    [
        ({"segments", "grouped"}, Sizes("bfloat16", 4096, 128), "cudnn_ring"),
        ({"window"}, Sizes("bfloat16", 4096, 128), "ring"),
        (set(), Sizes("float32", 4096, 128), "ring"),
        (set(), Sizes("bfloat16", 4098, 128), "ring"),
    ],
)
def test_auto_takes_it_where_a_gpu_splits_sequences(need, sizes, chosen):
    needs = Requirements(context=True, **dict.fromkeys(need, True))
    assert choose("auto", needs, sizes, Target("gpu")) == chosen
