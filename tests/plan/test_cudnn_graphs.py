"""The table of what cuDNN supports, and the workspaces by formula, beside cuDNN's own answers.

Its library builds the graphs for GPUs that are not there, a process for each kind of GPU.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.model.attention.backends import Requirements, Sizes, backend
from gptjax.parallel.mesh import AXES
from gptjax.plan import collectives, cudnn_library, gpu_compiler, machines, memory

REPO = Path(__file__).resolve().parents[2]
ASKS = gpu_compiler._plugin() is not None and cudnn_library.version() in cudnn_library.VERSIONS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not ASKS, reason="nothing to ask: pip install 'gptjax[gpu-plan,gpu-cudnn]' on Python 3.12"
    ),
]

ASK = """
import json, re, sys
from gptjax.plan import machines
machines.set_environment()
import jax, jax.numpy as jnp, numpy as np
from gptjax.plan import gpu_compiler

machine, cases = sys.argv[1], json.loads(sys.argv[2])
mesh = jax.sharding.Mesh(np.array(gpu_compiler.devices(machines.parse(machine + ":1"))), ("x",))

def ask(shape, kv_heads, documents, window, deterministic):
    b, t, h, c = shape
    def loss(q, k, v, segments):
        mask = (segments[:, :, None] == segments[:, None, :])[:, None] if documents else None
        seen = (window - 1, 0) if window else None
        out = jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=True, local_window_size=seen, implementation="cudnn")
        return out.astype(jnp.float32).sum()
    whole = jax.NamedSharding(mesh, jax.P())
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)
    arrays = [array((b, t, n, c), jnp.bfloat16) for n in (h, kv_heads, kv_heads)]
    options = {"xla_gpu_exclude_nondeterministic_ops": True, "xla_gpu_enable_triton_gemm": False}
    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays, array((b, t), jnp.int32))
    text = lowered.compile(compiler_options=options if deterministic else {}).as_text()
    [call] = [line for line in text.splitlines() if "fmha" in line and "Backward" in line]
    return max(map(int, re.findall(r"u8\\[(\\d+)\\]", call.split("custom-call")[0])), default=0)

answers = []
for case in cases:
    try:
        answers.append(ask(*case))
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        answers.append(str(error))
print(json.dumps(answers))
"""

GPUS = ["a100", "h100", "b200", pytest.param("rtxpro6000", marks=pytest.mark.exhaustive)]
HEADS = [60, 120, 136, 192, 256, 264]
FEATURES = [(True, 256)]  # documents masked, the window

LENGTHS = [1000, 1023]
# [B, T, H, K, C], and whether the backward pass is deterministic.
WORKSPACES = [
    ((2, 1024, 8, 128), 2, False),
    ((2, 2048, 8, 64), 8, True),
    ((1, 4096, 8, 128), 2, True),
    ((2, 1024, 8, 256), 2, False),
]


@functools.cache
def answers(gpu: str) -> list[int | str]:
    """cuDNN's answers to all cases: a workspace in bytes, or its refusal."""
    cases = [((2, 1024, 8, head), 8, False, 0, False) for head in HEADS]
    cases += [((2, 1024, 8, 64), 2, *features, False) for features in FEATURES]
    cases += [((2, length, 8, 64), 8, False, 0, False) for length in LENGTHS]
    cases += [(shape, kv, False, 0, exact) for shape, kv, exact in WORKSPACES]
    command = [sys.executable, "-c", ASK, gpu, json.dumps(cases)]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def refused(gpu: str, sizes: Sizes, *needed: str) -> bool:
    need = Requirements(**dict.fromkeys(needed, True))
    return backend("cudnn").refusal(need, sizes, machines.DEVICES[gpu].target) is not None


@pytest.mark.parametrize("gpu", GPUS)
def test_the_table_refuses_what_cudnn_refuses_and_nothing_else(gpu) -> None:
    asked = iter(answers(gpu))
    told = {head: isinstance(next(asked), str) for head in HEADS}
    assert told == {head: refused(gpu, Sizes("bfloat16", 1024, head)) for head in HEADS}
    for documents, window in FEATURES:
        needed = ["grouped"] + ["segments"] * documents + ["window"] * bool(window)
        answer = next(asked)
        assert isinstance(answer, str) == refused(gpu, Sizes("bfloat16", 1024), *needed), answer
    told = {length: isinstance(next(asked), str) for length in LENGTHS}
    assert told == {length: refused(gpu, Sizes("bfloat16", length)) for length in LENGTHS}
    assert any(told.values())
    assert not all(told.values())


@pytest.mark.parametrize("gpu", GPUS)
def test_the_formula_gives_the_workspace_that_cudnn_asks_for(gpu, tiny_config) -> None:
    for ((b, t, h, c), kv, exact), answer in zip(
        WORKSPACES, answers(gpu)[-len(WORKSPACES) :], strict=True
    ):
        if refused(gpu, Sizes("bfloat16", t, c)):
            continue
        model = {"heads": h, "kv_heads": kv, "head_dim": c, "embed": h * c, "context": t}
        train, compute = {"seq_len": t, "batch_tokens": b * t}, {"deterministic": exact}
        cfg = tiny_config(model=model, train=train, compute=compute)
        shape = collectives.step_shape(cfg, dict.fromkeys(AXES, 1), ("cudnn",))
        found = memory.cudnn_workspace(shape, machines.DEVICES[gpu])
        assert found == pytest.approx(answer, rel=0.02, abs=1024), (gpu, b, t, h, kv, c, exact)
