"""Presets for accelerator pods: a model, a machine, and a mesh from the front of `gptjax plan`.

    gptjax plan configs/pods.py:llama3_8b_v5e_256 --compile
    gptjax train configs/pods.py:llama3_8b_v5e_256 --data.sources 'corpus/*.jsonl.zst'

Of the meshes that `--search` finds about equally fast, these are the simplest: fsdp alone where
each device then has a whole sequence, and another axis only where batch, memory or experts need it.
The recipes are those of the models' own presets; GPT-3's batch of 3.2 million tokens is rounded to
1536 sequences, which these meshes divide, and begins with 512. Llama 3.1 405B has one stage here,
of its first batch: each stage has the mesh that suits its lengths. The README has each preset's
predicted memory and time, by arithmetic and by the TPU's compiler.
"""

from dataclasses import replace

from gptjax.config import Config, MeshConfig, on_machine


def gpt2_small_v5e_4() -> Config:
    """GPT-2 124M on 2x2 of v5e."""
    return _on("v5e:2x2", "gpt2:small", data=4, accumulation=8)


def gpt3_175b_v5p_512() -> Config:
    """GPT-3 175B on 8x8x8 of v5p: fsdp alone."""
    return _on("v5p:8x8x8", "gpt3:gpt3_175b", fsdp=512, **_GPT3)


def gpt3_175b_v5p_2048() -> Config:
    """GPT-3 175B on 8x16x16 of v5p: each sequence on four devices by tensor parallelism."""
    return _on("v5p:8x16x16", "gpt3:gpt3_175b", fsdp=512, tensor=4, **_GPT3)


def llama3_8b_v5e_256() -> Config:
    """Llama 3 8B on 16x16 of v5e."""
    return _on("v5e:16x16", "llama:llama3_8b", fsdp=256)


def llama3_8b_v5e_2x256() -> Config:
    """Llama 3 8B on two slices of 16x16 of v5e: only gradients cross the network."""
    return _on("2xv5e:16x16", "llama:llama3_8b", data=2, fsdp=256)


def llama3_70b_v5p_512() -> Config:
    """Llama 3 70B on 8x8x8 of v5p."""
    return _on("v5p:8x8x8", "llama:llama3_70b", fsdp=512)


def llama31_405b_v5p_128() -> Config:
    """Llama 3.1 405B on 4x4x8 of v5p, the smallest slice that its training fits."""
    mesh = {"fsdp": 32, "tensor": 4, "accumulation": 16, "batch_tokens": 4_194_304}
    return replace(_on("v5p:4x4x8", "llama:llama31_405b", **mesh), stages={})


def llama31_8b_128k_v5p_512() -> Config:
    """Llama 3.1 8B on 8x8x8 of v5p, with sequences of 131,072 tokens on 16 devices each."""
    return _on("v5p:8x8x8", "llama:llama31_8b", fsdp=32, context=16, seq_len=131_072)


def mixtral_8x7b_v5p_128() -> Config:
    """Mixtral 8x7B on 4x4x8 of v5p, one expert on each device, capacity factor 1.25."""
    cfg = _on("v5p:4x4x8", "mixtral:mixtral_8x7b", fsdp=16, expert=8, accumulation=4)
    moe = replace(cfg.model.moe, capacity=1.25)
    return replace(cfg, model=replace(cfg.model, moe=moe))


_GPT3 = {
    "batch_tokens": 1536 * 2048,
    "batch_start_tokens": 512 * 2048,
    "batch_increment_tokens": 512 * 2048,
}


def _on(machine: str, preset: str, *, data=1, fsdp=1, expert=1, context=1, tensor=1, **train):
    mesh = MeshConfig(data, fsdp, expert, tensor, context)
    return on_machine(machine, preset, mesh, train=train)
