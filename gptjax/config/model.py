"""Model fields: the decoder's architecture, its rotary positions and its mixture of experts."""

from dataclasses import dataclass
from typing import Literal

from gptjax.config.field import free, identity, schedule


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (RoPE, Su et al. 2021), with scaling to longer contexts."""

    theta: float = identity(10000.0)
    """Base of the rotation frequencies; above 0."""
    fraction: float = identity(1.0)
    """Fraction of a head's dimensions that is rotated, above 0 and at most 1; the remaining
    dimensions carry no position."""
    scaling: Literal["none", "linear", "low_frequency", "yarn"] = identity("none")
    """Scaling of the frequencies to longer contexts: none; linear, all alike (Chen et al. 2023);
    low_frequency, only the low ones (Llama 3.1); or yarn (Peng et al. 2023)."""
    factor: float = identity(1.0)
    """Ratio of the scaled context to the original one; at least 1."""
    original_context: int = identity(0)
    """Context before scaling, in tokens; required by low_frequency and yarn."""
    low_freq_factor: float = identity(1.0)
    """With low_frequency: wavelengths above original_context / low_freq_factor are scaled by the
    full factor."""
    high_freq_factor: float = identity(4.0)
    """With low_frequency: wavelengths below original_context / high_freq_factor are not scaled."""
    beta_fast: float = identity(32.0)
    """With yarn: dimensions with at least this many rotations in the original context are not
    scaled."""
    beta_slow: float = identity(1.0)
    """With yarn: dimensions with at most this many rotations in the original context are scaled by
    the full factor."""
    attention_factor: float | None = identity(None)
    """With yarn: multiplier of sine and cosine. None: 0.1 ln(factor) + 1."""


@dataclass(frozen=True)
class MoeConfig:
    """Mixture of experts (MoE): feed-forward layers of which each token uses a few experts."""

    experts: int = identity(0)
    """Number of experts in each layer. 0: dense layers."""
    top_k: int = identity(2)
    """Number of experts that each token is routed to."""
    hidden: int | None = identity(None)
    """Hidden width of an expert. None: model.mlp."""
    normalize: bool = identity(True)
    """Normalise the router weights of a token's selected experts to sum to 1; otherwise they are
    the softmax over all experts."""
    shared: int = identity(0)
    """Number of shared experts, which every token uses; computed as one feed-forward layer of their
    total width. 0: none."""
    capacity: float = schedule(0.0)
    """Capacity factor in training: an expert takes at most this many times its even share of a
    sequence's tokens, and further tokens are dropped and counted. 0: no limit, nothing is
    dropped."""
    balance_loss: float = schedule(0.01)
    """Weight of the load-balancing loss (Fedus et al. 2021), computed by sequence."""
    router_z_loss: float = schedule(0.001)
    """Weight of the router z-loss, the squared log-partition (Zoph et al. 2022)."""


@dataclass(frozen=True)
class ModelConfig:
    """The decoder-only Transformer. A model family is a combination of these fields (configs/)."""

    vocab_size: int = identity(50257)
    """Number of tokens that can be predicted; at least the tokenizer's vocabulary."""
    vocab_multiple: int = identity(128)
    """Embedding tables are padded to a multiple of this many rows, which suits mesh axes and matrix
    units. Padding rows are never predicted and not counted as parameters."""
    context: int = identity(1024)
    """Longest sequence that the model accepts, in tokens."""
    layers: int = identity(12)
    """Number of Transformer blocks."""
    embed: int = identity(768)
    """Width of the residual stream."""
    heads: int = identity(12)
    """Number of query heads."""
    kv_heads: int | None = identity(None)
    """Number of key and value heads; fewer than heads is grouped-query attention (GQA). None: as
    many as heads."""
    head_dim: int | None = identity(None)
    """Width of a head. None: embed / heads."""
    mlp: int | None = identity(None)
    """Hidden width of the feed-forward layer. None: 4 * embed."""
    activation: Literal["gelu_tanh", "gelu", "swiglu"] = identity("gelu_tanh")
    """Activation of the feed-forward layer: gelu_tanh is the tanh approximation (GPT-2), gelu is
    exact, swiglu is a gated layer (Shazeer 2020)."""
    moe: MoeConfig = free(MoeConfig)
    norm: Literal["layernorm", "rmsnorm"] = identity("layernorm")
    """Normalisation layer."""
    norm_eps: float = identity(1e-5)
    """Epsilon that the normalisation adds to the variance."""
    norm_position: Literal["pre", "post"] = identity("pre")
    """Normalisation before each sub-layer (pre), or after its residual sum (post, GPT-1)."""
    residual: Literal["sequential", "parallel"] = identity("sequential")
    """Feed-forward layer after attention, or both in parallel from the same input (Falcon)."""
    shared_norm: bool = identity(False)
    """One normalisation for both branches; requires residual=parallel."""
    qk_norm: bool = identity(False)
    """RMSNorm of each head's queries and keys, before rotary positions (Henry et al. 2020)."""
    positions: Literal["learned", "rope", "alibi", "none"] = identity("learned")
    """Position encoding."""
    rope: RopeConfig = free(RopeConfig)
    alibi: Literal["exact", "scaled_bf16"] = identity("exact")
    """ALiBi biases as published (Press et al. 2021), or as Falcon-RW was trained: absolute biases
    rounded to bfloat16 and divided by sqrt(head_dim) with the scores."""
    window: int | None = identity(None)
    """Sliding window of windowed layers: the number of keys that a query sees, its own included, in
    tokens. None: no layer is windowed."""
    pattern: tuple[Literal["full", "window"], ...] = identity(("full",))
    """Attention of successive layers, full or window, repeated over the depth; its length divides
    layers."""
    attention_soft_cap: float = identity(0.0)
    """Attention scores are bounded to this magnitude by tanh (Gemma 2). 0: unbounded."""
    logit_soft_cap: float = identity(0.0)
    """Logits are bounded to this magnitude by tanh. 0: unbounded."""
    linear_bias: bool = identity(True)
    """Biases in the linear layers."""
    norm_bias: bool = identity(True)
    """Biases in LayerNorm."""
    tied_embeddings: bool = identity(True)
    """The output layer shares the embedding table."""
    dropout: float = identity(0.0)
    """Dropout rate in training, of embeddings, attention weights and sub-layer outputs."""
    init_std: float = identity(0.02)
    """Standard deviation of initial weights; residual projections use it times
    1 / sqrt(2 * layers)."""

    @property
    def kv(self) -> int:
        """Number of key and value heads, with the default resolved."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def hidden(self) -> int:
        """Hidden width of the feed-forward layer, with the default resolved."""
        return 4 * self.embed if self.mlp is None else self.mlp

    @property
    def expert_hidden(self) -> int:
        """Hidden width of an expert, with the default resolved."""
        return self.hidden if self.moe.hidden is None else self.moe.hidden

    @property
    def head(self) -> int:
        """Width of a head, with the default resolved."""
        return self.embed // self.heads if self.head_dim is None else self.head_dim

    @property
    def attention_scale(self) -> float:
        """The factor on products of queries and keys: 1/sqrt(head_dim) (Vaswani et al. 2017)."""
        return self.head**-0.5

    @property
    def table(self) -> int:
        """Rows of the embedding table and of the output layer, padding included."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple
