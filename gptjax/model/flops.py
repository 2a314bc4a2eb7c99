"""What a model has and costs: parameters by part, and floating-point operations."""

from dataclasses import dataclass

import jax

from gptjax.config import ModelConfig
from gptjax.model import decoder
from gptjax.parallel import mesh


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters. `active` are those that one token meets: of the experts, its own."""

    parts: dict[str, int]
    active: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())


def parameters(cfg: ModelConfig) -> Parameters:
    """Counts the shapes that `decoder.init` would make; nothing is allocated, no device touched.

    Rows that fill up the embedding table are left out: they are no part of the model.
    """
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh()):
        shapes = jax.eval_shape(lambda: decoder.init(cfg, jax.random.key(0)))
    parts: dict[str, int] = {}
    idle = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        names = [key.key for key in path]
        size = leaf.size
        if names[-1] in ("embed", "head"):
            size = size // cfg.table * cfg.vocab_size
        part = _part(names, cfg)
        parts[part] = parts.get(part, 0) + size
        if part == "experts":
            idle += size - size * cfg.moe.top_k // cfg.moe.experts
    return Parameters(parts, sum(parts.values()) - idle)


def _part(names: list[str], cfg: ModelConfig) -> str:
    """The part of the model that a parameter belongs to."""
    if names[0] in ("embed", "positions", "head"):
        return {"embed": "embedding", "positions": "positions", "head": "output layer"}[names[0]]
    if any(name.startswith("norm") for name in names) or names[-1].endswith("scale"):
        return "norms"
    if "attn" in names:
        return "attention"
    if not cfg.moe.experts:
        return "feed-forward"
    if names[-1].startswith("shared_"):
        return "shared experts"
    return "router" if names[-1] == "router" else "experts"


def flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Floating-point operations of training on one token: forward, and twice that backward.

    6 for each weight of a matrix product (the output layer and a token's own experts included,
    embedding look-ups not), plus attention's own 12 * heads * head_dim for each key, of which
    causal masking leaves half, and a window fewer. (Kaplan et al. 2020, section 2.1; PaLM, appendix
    B, with the causal half taken.)
    """
    attn = cfg.embed * cfg.head * (2 * cfg.heads + 2 * cfg.kv)
    matrices = 3 if cfg.activation == "swiglu" else 2
    mlp = matrices * cfg.embed * cfg.hidden
    if moe := cfg.moe.experts and cfg.moe:
        active = moe.top_k + moe.shared
        mlp = matrices * cfg.embed * cfg.expert_hidden * active + cfg.embed * moe.experts
    weights = cfg.layers * (attn + mlp) + cfg.vocab_size * cfg.embed
    keys = {"full": (seq_len + 1) / 2}
    if "window" in cfg.pattern:
        w = min(cfg.window or seq_len, seq_len)
        keys["window"] = w - w * (w - 1) / (2 * seq_len)
    seen = sum(keys[kind] for kind in cfg.pattern) * cfg.layers / len(cfg.pattern)
    return 6.0 * weights + 12.0 * cfg.heads * cfg.head * seen
