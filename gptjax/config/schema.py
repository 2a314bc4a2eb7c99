"""The fields: nested frozen dataclasses, each field with its meaning and its role in a resume."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from gptjax.config import validation
from gptjax.errors import ConfigError


def _field(resume: str, default: Any) -> Any:
    """A field marked with what a change of it means to a run that resumes."""
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata={"resume": resume})
    return dataclasses.field(default=default, metadata={"resume": resume})


def identity(default: Any) -> Any:
    """A field that decides which run this is: a resume with another value is refused."""
    return _field("identity", default)


def schedule(default: Any) -> Any:
    """A field that may change at a resume, and then changes what is learnt: reported."""
    return _field("schedule", default)


def free(default: Any) -> Any:
    """A field that may change at a resume and leaves the mathematics as it is."""
    return _field("free", default)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (Su et al. 2021), and how they are stretched over longer contexts."""

    theta: float = identity(10000.0)
    """Base of the frequencies."""
    fraction: float = identity(1.0)
    """Share of a head's width that is rotated; the rest has no position."""
    scaling: Literal["none", "linear", "low_frequency", "yarn"] = identity("none")
    """Stretching: all frequencies alike (Chen et al. 2023), the low ones only (Llama 3.1), or by
    the number of turns within the original context (YaRN, Peng et al. 2023)."""
    factor: float = identity(1.0)
    """How many times longer."""
    original_context: int = identity(0)
    """low_frequency, yarn: context before stretching, in tokens."""
    low_freq_factor: float = identity(1.0)
    """low_frequency: wavelengths above original_context / this are stretched in full."""
    high_freq_factor: float = identity(4.0)
    """low_frequency: wavelengths below original_context / this are left as they are."""
    beta_fast: float = identity(32.0)
    """yarn: from this many turns within the original context, left as they are."""
    beta_slow: float = identity(1.0)
    """yarn: to this many turns, stretched in full."""
    attention_factor: float | None = identity(None)
    """yarn: multiplies sine and cosine; None: 0.1 ln(factor) + 1."""


@dataclass(frozen=True)
class MoeConfig:
    """Mixture of experts: a feed-forward layer of which each token sees a few parts."""

    experts: int = identity(0)
    """Experts of a layer; 0: none, every layer is dense."""
    top_k: int = identity(2)
    """Experts that a token is sent to."""
    hidden: int | None = identity(None)
    """Hidden width of an expert; None: model.mlp."""
    normalize: bool = identity(True)
    """The weights of a token's experts sum to one; otherwise they are their shares of all."""
    shared: int = identity(0)
    """Experts beside these that every token sees, as one feed-forward layer of their widths."""
    capacity: float = schedule(0.0)
    """In training, an expert takes at most this many times its even share of a sequence's tokens,
    and what is beyond is dropped and counted; 0: every token reaches its experts."""
    balance_loss: float = schedule(0.01)
    """Weight of the loss that evens out the experts' shares (Fedus et al. 2021, by sequence)."""
    router_z_loss: float = schedule(0.001)
    """Weight of the router's squared log-partition (Zoph et al. 2022)."""


@dataclass(frozen=True)
class ModelConfig:
    """The decoder. Orthogonal choices; a family is a combination of them (see configs/)."""

    vocab_size: int = identity(50257)
    """Tokens that can be predicted; at least the tokenizer's vocabulary."""
    vocab_multiple: int = identity(128)
    """Tables are filled up to a multiple of this many rows, which no mesh axis or matrix unit
    stumbles over. The rows added are never predicted and count for nothing."""
    context: int = identity(1024)
    """Longest sequence that the model accepts, in tokens."""
    layers: int = identity(12)
    """Number of blocks."""
    embed: int = identity(768)
    """Width of the residual stream."""
    heads: int = identity(12)
    """Query heads."""
    kv_heads: int | None = identity(None)
    """Key and value heads (grouped-query attention); None: as many as query heads."""
    head_dim: int | None = identity(None)
    """Width of a head; None: embed / heads."""
    mlp: int | None = identity(None)
    """Hidden width of the feed-forward layer; None: 4 * embed."""
    activation: Literal["gelu_tanh", "gelu", "swiglu"] = identity("gelu_tanh")
    """Feed-forward kind: tanh GELU (GPT-2), exact GELU, or the gated SwiGLU."""
    moe: MoeConfig = free(MoeConfig)
    norm: Literal["layernorm", "rmsnorm"] = identity("layernorm")
    """Normalisation layer."""
    norm_eps: float = identity(1e-5)
    """Added to the variance inside the normalisation."""
    norm_position: Literal["pre", "post"] = identity("pre")
    """Normalise the input of each sub-layer, or the sum after it (GPT-1)."""
    residual: Literal["sequential", "parallel"] = identity("sequential")
    """Feed-forward after attention, or both from the same input (Falcon)."""
    shared_norm: bool = identity(False)
    """With residual=parallel: one normalisation feeds both branches."""
    qk_norm: bool = identity(False)
    """RMSNorm of each head's queries and keys, before rotary positions (Henry et al. 2020)."""
    positions: Literal["learned", "rope", "alibi", "none"] = identity("learned")
    """How a token knows its place."""
    rope: RopeConfig = free(RopeConfig)
    alibi: Literal["exact", "scaled_bf16"] = identity("exact")
    """Linear biases as published (Press et al. 2021), or rounded to bfloat16 at their absolute
    place and divided by sqrt(head_dim) with the scores, as Falcon-RW was trained."""
    window: int | None = identity(None)
    """Keys that a windowed layer sees, itself included, in tokens."""
    pattern: tuple[Literal["full", "window"], ...] = identity(("full",))
    """Attention of successive layers, repeated down the stack."""
    attention_soft_cap: float = identity(0.0)
    """Scores are bounded to +- this by tanh (Gemma 2); 0: not."""
    logit_soft_cap: float = identity(0.0)
    """Logits likewise."""
    linear_bias: bool = identity(True)
    """Biases in the linear layers."""
    norm_bias: bool = identity(True)
    """Biases in LayerNorm."""
    tied_embeddings: bool = identity(True)
    """The output layer is the transposed embedding table."""
    dropout: float = identity(0.0)
    """Dropped share of embeddings, attention weights and sub-layer outputs in training."""
    init_std: float = identity(0.02)
    """Standard deviation of initial weights; residual projections get 1/sqrt(2 layers) of it."""

    @property
    def kv(self) -> int:
        """Key and value heads, resolved."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def hidden(self) -> int:
        """Feed-forward width, resolved."""
        return 4 * self.embed if self.mlp is None else self.mlp

    @property
    def expert_hidden(self) -> int:
        """Width of an expert, resolved."""
        return self.hidden if self.moe.hidden is None else self.moe.hidden

    @property
    def head(self) -> int:
        """Width of a head, resolved."""
        return self.embed // self.heads if self.head_dim is None else self.head_dim

    @property
    def attention_scale(self) -> float:
        """The factor on products of queries and keys: 1/sqrt(head_dim) (Vaswani et al. 2017)."""
        return self.head**-0.5

    @property
    def table(self) -> int:
        """Rows of the embedding table and of the output layer."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclass(frozen=True)
class ComputeConfig:
    """How the model is computed; none of it changes what is computed."""

    dtype: Literal["float32", "bfloat16"] = schedule("float32")
    """Of activations and matrix products; parameters and optimizer state stay in float32."""
    attention: str = free("auto")
    """Attention backend: auto (the fastest that supports the model on the device at hand),
    reference, blockwise, ring, splash, cudnn, or a registered name (config/registry.py)."""
    scan_layers: bool = free(True)
    """Compile one block and loop over it (fast to compile), or unroll the stack (fast to run)."""
    remat: Literal["none", "block", "dots"] = free("none")
    """Recompute in the backward pass: nothing, whole blocks, or all but the matrix products."""
    microbatches: int = free(0)
    """With mesh.stage: parts of a batch (of one accumulation step's) that pass the stages one
    after another, a multiple of the stages; 0: as many as stages. More of them idle less."""
    rounds: int = free(1)
    """With mesh.stage: stretches of layers that each stage has, which a part passes in as many
    rounds (the circular, or interleaved, schedule). More of them idle less, and send more."""
    loss_chunks: int = free(1)
    """Parts in which logits and loss are computed, so that all logits never exist at once; where
    a device's tokens are no multiple of it, the nearest number below that divides them."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; their product is the number of devices."""

    data: int = free(-1)
    """Replicas that share nothing but gradients; -1: all devices that the other axes leave."""
    fsdp: int = free(1)
    """Shards of parameters and optimizer state; the batch is split over them as well."""
    expert: int = free(1)
    """Shards of a mixture's experts; the batch is split over them as well."""
    tensor: int = free(1)
    """Shards of heads, feed-forward and vocabulary."""
    context: int = free(1)
    """Shards of a sequence, for contexts that are too long for a device."""
    stage: int = free(1)
    """Stages of a pipeline over the layers; the batch is split over them as well."""
    machine: str = free("")
    """Machine that these sizes are meant for, such as v5p:8x8x8; what `gptjax plan` plans for."""

    def shape(self, devices: int) -> dict[str, int]:
        """Sizes by axis name on so many devices. Raises ConfigError if they do not multiply out."""
        sizes = {
            "data": self.data,
            "stage": self.stage,
            "fsdp": self.fsdp,
            "expert": self.expert,
            "context": self.context,
            "tensor": self.tensor,
        }
        problems = [
            f"mesh.{axis}={size}: must be at least 1, or -1 for all devices that are left"
            for axis, size in sizes.items()
            if size < 1 and size != -1
        ]
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1:
            problems.append(f"mesh.{free[1]}=-1: mesh.{free[0]} takes what is left; give a number")
        if problems:
            raise ConfigError(problems)
        rest = math.prod(size for size in sizes.values() if size != -1)
        if free and devices % rest:
            raise ConfigError(
                [
                    f"mesh.{free[0]}=-1: the other axes take {rest} devices, which do not divide "
                    f"the {devices} of this machine; use one of {validation.divisors(devices)}"
                ]
            )
        sizes = {axis: devices // rest if size == -1 else size for axis, size in sizes.items()}
        if math.prod(sizes.values()) != devices:
            wanted = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
            raise ConfigError(
                [
                    f"mesh: {wanted} needs {math.prod(sizes.values())} devices and there are "
                    f"{devices}; set one axis to -1 to let it take the rest"
                ]
            )
        return sizes


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer: loaded from a file, or trained on the data when the store is prepared."""

    kind: Literal["bytes", "sentencepiece", "huggingface"] = identity("sentencepiece")
    """Raw bytes, a SentencePiece model, or Hugging Face's tokenizer.json."""
    path: str = identity("")
    """The .model or tokenizer.json file to use, or its folder; empty: train one on the training
    documents. Special tokens are those that the files beside tokenizer.json declare."""
    algorithm: Literal["bpe", "unigram", "byte_bpe", "wordpiece"] = identity("bpe")
    """What to train: bpe or unigram with kind=sentencepiece, byte_bpe (GPT-2's byte-level BPE) or
    wordpiece (BERT's, which loses spaces) with kind=huggingface."""
    vocab_size: int = identity(4096)
    """Pieces to train, special ones included."""
    sample_bytes: int = identity(10_000_000)
    """Text to train on, in bytes, taken evenly from the training documents."""


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from, and how it becomes training windows."""

    sources: tuple[str, ...] = identity(("python-library",))
    """Files or globs (.jsonl, .parquet by suffix, .gz and .zst too; anything else is one text a
    file), tfds:NAME or tfds:FOLDER, or python-library, the sources of the running Python."""
    valid_sources: tuple[str, ...] = identity(())
    """Validation documents; empty: held out from the sources by valid_fraction."""
    valid_fraction: float = identity(0.02)
    """Share of documents held out, by a hash of each one's path or record name."""
    text_field: str = identity("text")
    """Field of jsonl, Parquet and TFDS records that holds the text."""
    store: str = free("data/store")
    """Folder of the token store; prepared when missing. It may move: a run knows its tokens by
    their fingerprint."""
    documents: Literal["ignore", "mask"] = identity("ignore")
    """Whether attention crosses document borders within a window, or is masked there; positions
    then restart at each border."""
    max_document_bytes: int = identity(64_000_000)
    """A longer text file is tokenized in pieces, cut at a line's end; a longer record is
    refused."""
    bad_utf8: Literal["replace", "fail"] = identity("replace")
    """Invalid UTF-8 becomes U+FFFD and is counted, or is an error that names the place."""
    workers: int = free(0)
    """Tokenizing processes; 0: one per core."""
    prefetch: int = free(32)
    """Batches that the input pipeline reads ahead."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule. Lengths are in tokens."""

    name: str = identity("adamw")
    """Update rule: adamw, adafactor, lion, muon (for matrices, with adamw for all else), or a
    registered name (config/registry.py)."""
    lr: float = schedule(6e-4)
    """Peak learning rate."""
    lr_schedule: Literal["cosine", "wsd", "linear", "constant"] = schedule("cosine")
    """Shape after the warm-up; wsd is constant, then linear over the last decay_tokens."""
    warmup_tokens: int = schedule(0)
    """Tokens over which the rate rises linearly from zero."""
    decay_tokens: int = schedule(0)
    """wsd: tokens of the final decay."""
    final_lr_ratio: float = schedule(0.1)
    """Rate at the end, as a share of the peak."""
    b1: float = schedule(0.9)
    """Decay of the first moment (momentum of lion and muon)."""
    b2: float = schedule(0.95)
    """Decay of the second moment."""
    eps: float = schedule(1e-8)
    """Added to the root of the second moment."""
    weight_decay: float = schedule(0.1)
    """Decoupled decay, on matrices only."""
    clip: float = schedule(1.0)
    """Largest norm of the gradient, all parameters together; 0: no clipping."""


@dataclass(frozen=True)
class TuneConfig:
    """What learns, and how fast, of the parameters that a run begins with."""

    freeze: tuple[str, ...] = identity(())
    """Parameters that stay as they are: regular expressions, each of a whole path, such as
    embed or blocks/.*/mlp/.*"""
    freeze_layers: int = identity(0)
    """The lowest so many layers stay as they are; of the embeddings, freeze decides."""
    layer_decay: float = schedule(1.0)
    """The rate of a layer is this times that of the layer above it, from 1 at the top; embeddings
    are below the lowest (Clark et al. 2020)."""


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of low rank beside frozen matrices (Hu et al. 2021)."""

    rank: int = identity(0)
    """Inner width of an adapter; 0: there are none, and the matrices themselves learn."""
    alpha: float = identity(16.0)
    """What an adapter adds is multiplied by alpha / rank."""
    rslora: bool = identity(False)
    """By alpha / sqrt(rank) instead, which suits high ranks (Kalajdzievski 2023)."""
    targets: tuple[str, ...] = identity(("blocks/.*/attn/(q|v)",))
    """The matrices of the blocks that have adapters: regular expressions, each of a whole path."""

    @property
    def scale(self) -> float:
        """The multiplier."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True)
class TrainConfig:
    """Budget, batch and loss."""

    seed: int = identity(0)
    """Of initialisation, data order, dropout and samples."""
    tokens: int = schedule(2_500_000_000)
    """Training budget."""
    batch_tokens: int = identity(524_288)
    """Tokens in an optimizer step, over all devices and accumulation steps."""
    seq_len: int = identity(1024)
    """Tokens in a training window; at most model.context."""
    accumulation: int = free(1)
    """Parts into which the batch is split, one after another, to save memory."""
    z_loss: float = schedule(0.0)
    """Weight of the squared log-partition term (PaLM, section 5)."""
    ema_decay: float = identity(0.0)
    """Decay of an exponential moving average of the parameters; 0: none is kept."""
    nonfinite_limit: int = free(3)
    """Steps in a row with a non-finite loss or gradient, none of which changes the parameters,
    after which the run ends."""

    @property
    def batch(self) -> int:
        """Sequences in an optimizer step."""
        return self.batch_tokens // self.seq_len

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole budget."""
        return -(-self.tokens // self.batch_tokens)


@dataclass(frozen=True)
class FinetuneConfig(TuneConfig):
    """Supervised learning of a task from a pre-trained model, as `gptjax finetune` sets it up.

    The defaults are those of generative pre-training's first publication (Radford et al. 2018).
    """

    task: Literal["none", "classify", "choose", "answer"] = identity("none")
    """A label of a text or of a pair, the right one of several choices, or an answer in words."""
    base: str = identity("")
    """The run, or hf:FOLDER, whose parameters it began from."""
    data: str = identity("")
    """Training examples, a JSON object a line."""
    valid: str = identity("")
    """Validation examples."""
    epochs: int = schedule(3)
    """Passes over the training examples, from which train.tokens comes unless that is given."""
    lm_weight: float = schedule(0.5)
    """classify, choose: weight of the auxiliary loss, that of predicting the examples' tokens."""
    dropout: float = schedule(0.1)
    """classify, choose: dropped share of the hidden state that the task's layer sees."""
    labels: tuple[str, ...] = identity(())
    """classify: the labels, in the order of the task layer's columns; taken from the data."""
    lora: LoraConfig = free(LoraConfig)
    """Adapters that learn in the place of the model."""

    @property
    def outputs(self) -> int:
        """Columns of the task's layer; 0: there is none."""
        return {"classify": len(self.labels), "choose": 1}.get(self.task, 0)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation and samples during training. Periods are in steps; 0: only at the end."""

    every: int = free(500)
    """Steps between evaluations on the validation split."""
    batch: int = free(32)
    """Sequences in an evaluation batch."""
    tasks: tuple[str, ...] = free(())
    """Tasks to evaluate on, KIND:FILE, as `gptjax eval --task` takes them."""
    tasks_every: int = free(0)
    """Steps between evaluations on the tasks."""
    task_limit: int = free(0)
    """Examples of a task, the first of its file; 0: all."""
    sample_every: int = free(0)
    """Steps between samples."""
    prompts: tuple[str, ...] = free(("",))
    """Samples continue these."""
    sample_tokens: int = free(128)
    """Longest sample, in tokens."""
    temperature: float = free(0.8)
    """Of the samples."""
    top_p: float = free(0.95)
    """Nucleus of the samples."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints. Periods are in steps."""

    every: int = free(500)
    """Steps between checkpoints; one is also written at the end and when told to stop."""
    keep: int = free(2)
    """Newest checkpoints that are kept."""
    keep_every: int = free(0)
    """Checkpoints at multiples of this many steps are kept for good; 0: none."""


@dataclass(frozen=True)
class LogConfig:
    """What a run tells, and where."""

    every: int = free(10)
    """Steps between lines of metrics."""
    tensorboard: bool = free(True)
    """Write TensorBoard event files beside metrics.jsonl."""
    writers: tuple[str, ...] = free(())
    """Further metric writers, by the names that they were registered under (config/registry.py)."""
    peak_tflops: float = free(0.0)
    """Peak of one device in TFLOP/s, for the MFU; 0: from the table of known devices."""
    profile_start: int = free(0)
    """Step at which jax.profiler begins to trace; 0: never."""
    profile_steps: int = free(3)
    """Steps in a trace."""
    compile_cache: str = free("~/.cache/gptjax/xla")
    """Folder of the persistent compilation cache; empty: none."""


@dataclass(frozen=True)
class WatchConfig:
    """When a run that hangs ends itself, for a scheduler to start it again: limits in seconds on
    how long it may stay in a stage; 0: for ever."""

    lost: int = free(60)
    """Of several processes, one that is silent for so long counts as lost."""
    restore: int = free(3600)
    """Claiming the run folder, agreeing, reading the newest checkpoint."""
    compile: int = free(7200)
    """Compiling the step, and reading the first batch."""
    data: int = free(900)
    """Waiting for a batch."""
    step: int = free(1800)
    """A step on the devices, and what compiles within it."""
    save: int = free(3600)
    """A checkpoint, as far as the loop waits for it."""
    eval: int = free(14400)
    """Evaluation and samples of one step."""


@dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    run: str = free("runs/default")
    """The run folder: configuration, tokenizer, checkpoints, metrics."""
    model: ModelConfig = free(ModelConfig)
    compute: ComputeConfig = free(ComputeConfig)
    mesh: MeshConfig = free(MeshConfig)
    tokenizer: TokenizerConfig = free(TokenizerConfig)
    data: DataConfig = free(DataConfig)
    optim: OptimConfig = free(OptimConfig)
    train: TrainConfig = free(TrainConfig)
    finetune: FinetuneConfig = free(FinetuneConfig)
    eval: EvalConfig = free(EvalConfig)
    checkpoint: CheckpointConfig = free(CheckpointConfig)
    log: LogConfig = free(LogConfig)
    watch: WatchConfig = free(WatchConfig)

    @property
    def drops(self) -> bool:
        """Whether anything is dropped in training."""
        return self.model.dropout > 0 or (self.finetune.outputs > 0 and self.finetune.dropout > 0)

    def check(self, devices: int | None = None, processes: int = 1) -> None:
        """Checks that the values go together; with `devices`, that they fit such a machine too.

        Raises ConfigError with every problem found.
        """
        problems = [*validation.value_problems(self)]
        if devices is not None:
            try:
                problems += validation.mesh_problems(self, self.mesh.shape(devices), processes)
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)
