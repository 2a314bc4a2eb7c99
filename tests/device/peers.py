"""The same work by PyTorch: GPT-2's training under torch.compile, and transformers' decoding."""

import importlib
import statistics
import sys
import time
from typing import Any

import torch
from decoding import BATCHES, NEW, PROMPT, llama
from rows import Rows
from workloads import workload

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def run(rows: Rows, which: str, *, toy: bool, nanogpt: str) -> None:
    torch.manual_seed(0)
    if which == "gpt2":
        train(rows, toy=toy, nanogpt=nanogpt)
    else:
        decode(rows, toy=toy)


def gpt2(cfg: Any, nanogpt: str) -> tuple[str, Any]:
    """GPT-2 of the configured size, and a function of ids to the loss.

    nanoGPT's own where its folder is given, else transformers' with PyTorch's fused attention.
    """
    m = cfg.model
    if nanogpt:
        sys.path.insert(0, nanogpt)
        theirs = importlib.import_module("model")
        shape = theirs.GPTConfig(
            m.context, m.table, m.layers, m.heads, m.embed, dropout=0.0, bias=True
        )
        model = theirs.GPT(shape).to(DEVICE)
        return "nanoGPT", (model, lambda ids, targets: model(ids, targets)[1])
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = GPT2Config(
        vocab_size=m.table,
        n_positions=m.context,
        n_embd=m.embed,
        n_layer=m.layers,
        n_head=m.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="sdpa",
    )
    model = GPT2LMHeadModel(shape).to(DEVICE)

    def loss(ids: Any, targets: Any) -> Any:
        logits = model(ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return "transformers", (model, loss)


def train(rows: Rows, *, toy: bool, nanogpt: str) -> None:
    """Steps in bfloat16 under autocast, as nanoGPT's bench.py has them."""
    cfg = workload("gpt2", toy=toy)
    name, (model, loss) = gpt2(cfg, nanogpt)
    torch.set_float32_matmul_precision("high")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=DEVICE == "cuda"
    )
    compiled = loss if toy else torch.compile(loss)
    shape = cfg.train.batch, cfg.train.seq_len + 1
    ids = torch.randint(0, cfg.model.vocab_size, shape, device=DEVICE)

    def step() -> None:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            value = compiled(ids[:, :-1], ids[:, 1:])
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(1 if toy else 5):
        step()
    times = []
    for _ in range(2 if toy else 20):
        synchronize()
        began = time.perf_counter()
        step()
        synchronize()
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times)
    rows.add(f"{name}, torch.compile: step", seconds * 1000, "ms")
    rows.add(f"{name}, torch.compile: speed", cfg.train.batch_tokens / seconds, "tokens/s")
    if DEVICE == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        rows.add(f"{name}, torch.compile: allocator", peak, "GiB")


def decode(rows: Rows, *, toy: bool) -> None:
    """transformers' generate on the same shape, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    m = llama(toy=toy).model
    shape = LlamaConfig(
        vocab_size=m.vocab_size,
        hidden_size=m.embed,
        intermediate_size=m.mlp,
        num_hidden_layers=m.layers,
        num_attention_heads=m.heads,
        num_key_value_heads=m.kv,
        tie_word_embeddings=m.tied_embeddings,
    )
    model = LlamaForCausalLM(shape).to(DEVICE, torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    for batch in BATCHES[:1] if toy else BATCHES:
        ids = torch.randint(1, m.vocab_size, (batch, PROMPT), device=DEVICE)
        mask = torch.ones_like(ids)

        def generate(new: int, ids: Any = ids, mask: Any = mask) -> float:
            synchronize()
            began = time.perf_counter()
            model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                min_new_tokens=new,
                max_new_tokens=new,
                pad_token_id=0,
            )
            synchronize()
            return time.perf_counter() - began

        generate(2)
        seconds = generate(NEW) - generate(1)
        rate = batch * (NEW - 1) / seconds
        rows.add(f"transformers, {batch} sequences: decoding", rate, "tokens/s")
