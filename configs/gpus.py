"""Presets for NVIDIA GPUs: a model, a machine, and a mesh from the front of `gptjax plan`.

    gptjax plan gpus:llama3_8b_h100_8 --compile
    gptjax train gpus:llama3_8b_h100_8 --data.sources 'corpus/*.jsonl.zst'

fsdp alone where a batch allows it; tensor parallelism stays within a node. The recipes are those of
the models' own presets; GPT-3's batch of 3.2 million tokens is rounded to 1536 sequences, and
begins with 128. docs/gpu.md has each preset's memory and communication, by arithmetic and by XLA's
compiler.
"""

from gptjax.config import Config, MeshConfig, on_machine


def gpt2_small_rtx4090_1() -> Config:
    """GPT-2 124M on one card with 24 GB."""
    return _on("rtx4090:1", "gpt2:small", accumulation=16)


def gpt2_small_h100_1() -> Config:
    """GPT-2 124M on one H100."""
    return _on("h100:1", "gpt2:small", accumulation=4)


def llama3_8b_h100_8() -> Config:
    """Llama 3 8B on one node of eight H100."""
    return _on("h100:8", "llama:llama3_8b", fsdp=8, accumulation=32)


def llama3_8b_h100_16() -> Config:
    """Llama 3 8B on two nodes of eight H100: a copy of the model on each, over its eight GPUs."""
    return _on("h100:16", "llama:llama3_8b", data=2, fsdp=8, accumulation=32, remat="dots")


def llama3_70b_h100_64() -> Config:
    """Llama 3 70B on eight nodes of eight H100: tensor parallelism in a node, fsdp across nodes."""
    return _on("h100:64", "llama:llama3_70b", fsdp=8, tensor=8, accumulation=4)


def llama31_8b_128k_h100_8() -> Config:
    """Llama 3.1 8B on one node of eight H100, with sequences of 131,072 tokens."""
    return _on("h100:8", "llama:llama31_8b", tensor=8, seq_len=131_072, accumulation=32)


def mixtral_8x7b_h100_16() -> Config:
    """Mixtral 8x7B on two nodes of eight H100, every expert's width over the GPUs of a node."""
    return _on("h100:16", "mixtral:mixtral_8x7b", fsdp=2, tensor=8, accumulation=32)


def gpt3_175b_h100_512() -> Config:
    """GPT-3 175B on 64 nodes of eight H100: each sequence on a node by tensor parallelism."""
    batch = {"batch_tokens": 1536 * 2048, "batch_start_tokens": 128 * 2048}
    return _on(
        "h100:512", "gpt3:gpt3_175b", fsdp=64, tensor=8, batch_increment_tokens=128 * 2048, **batch
    )


def _on(
    machine: str, preset: str, *, data=1, fsdp=1, tensor=1, remat: str | None = None, **train: int
) -> Config:
    compute = {"dtype": "bfloat16"} | ({"remat": remat} if remat else {})
    mesh = MeshConfig(data, fsdp, tensor=tensor)
    return on_machine(machine, preset, mesh, compute=compute, train=train)
