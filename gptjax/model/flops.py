"""The cost of a model, from its configuration: parameters, FLOPs, and activations of a layer.

`gptjax config --count`, the MFU and the planner all read `ModelCost`.
"""

from dataclasses import dataclass
from functools import cached_property

import jax

from gptjax.config import ModelConfig
from gptjax.model import decoder
from gptjax.parallel import mesh


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by part of the model. `active`: without a token's idle experts."""

    parts: dict[str, int]
    active: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Weight:
    """A weight matrix of each layer; of an expert's matrices, those of all experts together.

    part: as in `Parameters.parts`. size: elements. active: of them, those that multiply one token.
    """

    name: str
    part: str
    size: int
    active: int


@dataclass(frozen=True)
class Activations:
    """Widths of one token's activations in one layer, in elements.

    queries: of all query heads, keys: of all key heads. projections: products into the hidden width
    (gate and up, or up). hidden: of one of them, in a mixture that of all the token's experts.
    routed: copies of the token in the experts' buffers, a capacity's spare places included.
    """

    embed: int
    queries: int
    keys: int
    projections: int
    hidden: int
    routed: float = 0.0
    routed_hidden: float = 0.0

    @property
    def qkv(self) -> int:
        """Queries, keys and values."""
        return self.queries + 2 * self.keys


@dataclass(frozen=True)
class ModelCost:
    """Parameters, weights, activations and FLOPs of a model."""

    cfg: ModelConfig

    @cached_property
    def parameters(self) -> Parameters:
        """Counted from the shapes of `decoder.init`; nothing is allocated, no device touched.

        Padding rows of the embedding table are left out: they are no part of the model.
        """
        cfg = self.cfg
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

    @cached_property
    def feed_forward_matrices(self) -> tuple[str, ...]:
        """Names of a feed-forward layer's matrices: gated (SwiGLU) or not."""
        return ("gate", "up", "down") if self.cfg.activation == "swiglu" else ("up", "down")

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """The weight matrices of one layer; biases and scales are left out."""
        m, moe = self.cfg, self.cfg.moe
        heads, kv_heads = m.embed * m.heads * m.head, m.embed * m.kv * m.head
        sizes = {"q": heads, "k": kv_heads, "v": kv_heads, "o": heads}
        found = [Weight(name, "attention", size, size) for name, size in sizes.items()]
        if not moe.experts:
            size = m.embed * m.hidden
            found += [Weight(n, "feed-forward", size, size) for n in self.feed_forward_matrices]
            return tuple(found)
        one = m.embed * m.expert_hidden
        for name in self.feed_forward_matrices:
            found.append(Weight(f"experts' {name}", "experts", moe.experts * one, moe.top_k * one))
            if moe.shared:
                size = moe.shared * one
                found.append(Weight(f"shared {name}", "shared experts", size, size))
        size = m.embed * moe.experts
        return (*found, Weight("router", "router", size, size))

    def weight_size(self, *parts: str) -> int:
        """Elements of one layer's weight matrices of these parts; of an absent part none."""
        return sum(weight.size for weight in self.weights if weight.part in parts)

    @cached_property
    def activations(self) -> Activations:
        """Of one layer."""
        m, moe = self.cfg, self.cfg.moe
        projections = len(self.feed_forward_matrices) - 1
        queries, keys = m.heads * m.head, m.kv * m.head
        if not moe.experts:
            hidden = m.hidden
            return Activations(m.embed, queries, keys, projections, hidden, 0.0, float(hidden))
        # An expert's buffer has places for more than its even share, if it has a capacity.
        routed = moe.top_k * max(1.0, moe.capacity)
        active = m.expert_hidden * (moe.top_k + moe.shared)
        buffered = m.expert_hidden * (routed + moe.shared)
        return Activations(m.embed, queries, keys, projections, active, routed, buffered)

    def flops_by_part(self, seq_len: int) -> dict[str, float]:
        """Floating-point operations of training on one token: forward, and twice that backward.

        6 for each weight of a matrix product (the output layer and a token's own experts included,
        embedding look-ups not), plus attention's own 12 * heads * head_dim for each key, of which
        causal masking leaves half, and a window fewer. (Kaplan et al. 2020, section 2.1; PaLM,
        appendix B, with the causal half taken.)
        """
        cfg = self.cfg
        attention = sum(weight.active for weight in self.weights if weight.part == "attention")
        rest = sum(weight.active for weight in self.weights if weight.part != "attention")
        keys = {"full": (seq_len + 1) / 2}
        if "window" in cfg.pattern:
            w = min(cfg.window or seq_len, seq_len)
            keys["window"] = w - w * (w - 1) / (2 * seq_len)
        seen = sum(keys[kind] for kind in cfg.pattern) * cfg.layers / len(cfg.pattern)
        return {
            "attention's projections": 6.0 * cfg.layers * attention,
            "experts" if cfg.moe.experts else "feed-forward": 6.0 * cfg.layers * rest,
            "output layer": 6.0 * cfg.vocab_size * cfg.embed,
            "attention's scores": 12.0 * cfg.heads * cfg.head * seen,
        }

    def flops_per_token(self, seq_len: int) -> float:
        """All of `flops_by_part`."""
        return sum(self.flops_by_part(seq_len).values())


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
