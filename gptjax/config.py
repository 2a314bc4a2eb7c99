"""The configuration: nested frozen dataclasses, their loading, validation and provenance.

A CONFIG argument is one of
  * a preset: a Python file and a function in it, `configs/gpt2.py:small` (`:main` may be left out);
  * a resolved configuration: a JSON file as `gptjax config --json` prints it;
  * a run folder, which holds such a file as `config.json`.

Validation has three stages, and each reports every problem at once, as `dotted.field=value: what
is wrong and what to do`: construction (types and unknown names, here and in tyro), `Config.check`
(whether the values go together, and with so many devices and processes), and `resume_changes`
(against the configuration that a run folder was started with).

Nothing here imports jax or tensorflow, so a bad flag fails in milliseconds.
"""

import dataclasses
import difflib
import importlib.util
import json
import math
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gptjax.errors import ConfigError, MismatchError

CONFIG_FILE = "config.json"


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
class ModelConfig:
    """The decoder. Orthogonal choices; a family is a combination of them (see configs/)."""

    vocab_size: int = identity(50304)
    """Rows of the embedding table; at least the tokenizer's vocabulary."""
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
    positions: Literal["learned", "rope", "alibi", "none"] = identity("learned")
    """How a token knows its place."""
    rope_theta: float = identity(10000.0)
    """Base of the rotary frequencies."""
    window: int | None = identity(None)
    """Keys that a windowed layer sees, itself included, in tokens."""
    pattern: tuple[Literal["full", "window"], ...] = identity(("full",))
    """Attention of successive layers, repeated down the stack."""
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
    def head(self) -> int:
        """Width of a head, resolved."""
        return self.embed // self.heads if self.head_dim is None else self.head_dim


@dataclass(frozen=True)
class ComputeConfig:
    """How the model is computed; none of it changes what is computed."""

    dtype: Literal["float32", "bfloat16"] = schedule("float32")
    """Of activations and matrix products; parameters and optimizer state stay in float32."""
    attention: Literal["auto", "reference", "blockwise", "splash", "cudnn"] = free("auto")
    """Attention backend; auto takes the fastest that supports the model on the device at hand."""
    scan_layers: bool = free(True)
    """Compile one block and loop over it (fast to compile), or unroll the stack (fast to run)."""
    remat: Literal["none", "block", "dots"] = free("none")
    """Recompute in the backward pass: nothing, whole blocks, or all but the matrix products."""
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
    tensor: int = free(1)
    """Shards of heads, feed-forward and vocabulary."""

    def shape(self, devices: int) -> dict[str, int]:
        """Sizes by axis name on so many devices. Raises ConfigError if they do not multiply out."""
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
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
                    f"the {devices} of this machine; use one of {_divisors(devices)}"
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

    kind: Literal["bytes", "sentencepiece"] = identity("sentencepiece")
    """Raw bytes, or a SentencePiece model."""
    path: str = identity("")
    """A SentencePiece .model file to use; empty: train one on the training documents."""
    algorithm: Literal["bpe", "unigram"] = identity("bpe")
    """What to train."""
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

    name: Literal["adamw", "adafactor", "lion", "muon"] = identity("adamw")
    """Update rule; muon is for matrices, with adamw for all else."""
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
    accumulation: int = schedule(1)
    """Parts into which the batch is split, one after another, to save memory. The gradient is the
    same, but each part draws its own dropout."""
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
class EvalConfig:
    """Evaluation and samples during training. Periods are in steps; 0: only at the end."""

    every: int = free(500)
    """Steps between evaluations on the validation split."""
    batch: int = free(32)
    """Sequences in an evaluation batch."""
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
    peak_tflops: float = free(0.0)
    """Peak of one device in TFLOP/s, for the MFU; 0: from the table of known devices."""
    profile_start: int = free(0)
    """Step at which jax.profiler begins to trace; 0: never."""
    profile_steps: int = free(3)
    """Steps in a trace."""
    compile_cache: str = free("~/.cache/gptjax/xla")
    """Folder of the persistent compilation cache; empty: none."""


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
    eval: EvalConfig = free(EvalConfig)
    checkpoint: CheckpointConfig = free(CheckpointConfig)
    log: LogConfig = free(LogConfig)

    def check(self, devices: int | None = None, processes: int = 1) -> None:
        """Checks that the values go together; with `devices`, that they fit such a machine too.

        Raises ConfigError with every problem found.
        """
        problems = [*_value_problems(self)]
        if devices is not None:
            try:
                problems += _mesh_problems(self, self.mesh.shape(devices), processes)
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _divides(part: int, whole: int) -> bool:
    """Whether it does; a part below one is a problem told elsewhere, and none here."""
    return part < 1 or whole % part == 0


def _nearest_multiples(n: int, of: int) -> str:
    """The legal values around n, in words."""
    below, above = n // of * of, -(-n // of) * of
    return str(above) if below == 0 else f"{below} or {above}"


def _value_problems(cfg: Config) -> Iterator[str]:
    m, t, o = cfg.model, cfg.train, cfg.optim
    at_least_one = {
        **{f"model.{k}": getattr(m, k) for k in ("vocab_size", "context", "layers", "embed")},
        "model.heads": m.heads,
        "model.kv_heads": m.kv,
        "model.head_dim": 1 if m.head_dim is None else m.head_dim,
        "model.mlp": m.hidden,
        "compute.loss_chunks": cfg.compute.loss_chunks,
        "train.tokens": t.tokens,
        "train.batch_tokens": t.batch_tokens,
        "train.seq_len": t.seq_len,
        "train.accumulation": t.accumulation,
        "train.nonfinite_limit": t.nonfinite_limit,
        "eval.batch": cfg.eval.batch,
        "checkpoint.every": cfg.checkpoint.every,
        "checkpoint.keep": cfg.checkpoint.keep,
        "log.every": cfg.log.every,
        "log.profile_steps": cfg.log.profile_steps,
        "data.prefetch": cfg.data.prefetch,
        "data.max_document_bytes": cfg.data.max_document_bytes,
        "tokenizer.sample_bytes": cfg.tokenizer.sample_bytes,
    }
    for name, value in at_least_one.items():
        if value < 1:
            yield f"{name}={value}: must be at least 1"
    at_least_zero = {
        "optim.lr": o.lr,
        "optim.warmup_tokens": o.warmup_tokens,
        "optim.decay_tokens": o.decay_tokens,
        "optim.weight_decay": o.weight_decay,
        "optim.clip": o.clip,
        "train.z_loss": t.z_loss,
        "train.seed": t.seed,
        "data.workers": cfg.data.workers,
        "eval.every": cfg.eval.every,
        "eval.sample_every": cfg.eval.sample_every,
        "eval.temperature": cfg.eval.temperature,
        "checkpoint.keep_every": cfg.checkpoint.keep_every,
        "log.peak_tflops": cfg.log.peak_tflops,
        "log.profile_start": cfg.log.profile_start,
    }
    for name, value in at_least_zero.items():
        if not value >= 0:
            yield f"{name}={value}: must not be negative"
    shares = {
        "model.dropout": m.dropout,
        "train.ema_decay": t.ema_decay,
        "optim.b1": o.b1,
        "optim.b2": o.b2,
        "data.valid_fraction": cfg.data.valid_fraction,
    }
    for name, value in shares.items():
        if not 0 <= value < 1:
            yield f"{name}={value}: must be at least 0 and below 1"
    if not 0 < cfg.eval.top_p <= 1:
        yield f"eval.top_p={cfg.eval.top_p}: must be above 0 and at most 1"
    if t.seed >= 2**32:
        yield f"train.seed={t.seed}: must be below 2**32, which is what JAX's generator takes"
    if m.head_dim is None and not _divides(m.heads, m.embed):
        yield (
            f"model.heads={m.heads}: does not divide model.embed={m.embed}; legal values near it "
            f"are {_near(m.heads, _divisors(m.embed))}, or set model.head_dim"
        )
    if not _divides(m.kv, m.heads):
        yield (
            f"model.kv_heads={m.kv}: does not divide model.heads={m.heads}; legal values near it "
            f"are {_near(m.kv, _divisors(m.heads))}"
        )
    if m.positions == "rope" and m.heads >= 1 and m.head % 2:
        yield f"model.head_dim={m.head}: rotary positions need an even width"
    if not m.pattern:
        yield "model.pattern=(): needs at least one entry, for example full"
    elif not _divides(len(m.pattern), m.layers):
        yield (
            f"model.layers={m.layers}: is no multiple of the {len(m.pattern)} entries of "
            f"model.pattern; use {_nearest_multiples(m.layers, len(m.pattern))}"
        )
    if "window" in m.pattern and (m.window is None or m.window < 1):
        yield f"model.window={m.window}: model.pattern has windowed layers; give their width"
    if m.shared_norm and m.residual != "parallel":
        yield "model.shared_norm=True: only with model.residual=parallel"
    if m.norm_position == "post" and m.residual == "parallel":
        yield "model.norm_position=post: only with model.residual=sequential"
    if t.seq_len > m.context:
        yield (
            f"train.seq_len={t.seq_len}: longer than model.context={m.context}; lower the one or "
            "raise the other"
        )
    if not _divides(t.seq_len, t.batch_tokens):
        yield (
            f"train.batch_tokens={t.batch_tokens}: is no multiple of train.seq_len={t.seq_len}; "
            f"use {_nearest_multiples(t.batch_tokens, t.seq_len)}"
        )
    elif t.seq_len >= 1 and not _divides(t.accumulation, t.batch):
        yield (
            f"train.accumulation={t.accumulation}: does not divide the {t.batch} sequences of a "
            f"batch; legal values near it are {_near(t.accumulation, _divisors(t.batch))}"
        )
    if o.warmup_tokens > t.tokens:
        yield f"optim.warmup_tokens={o.warmup_tokens}: more than train.tokens={t.tokens}"
    if o.lr_schedule == "wsd" and o.decay_tokens + o.warmup_tokens > t.tokens:
        yield (
            f"optim.decay_tokens={o.decay_tokens}: with optim.warmup_tokens={o.warmup_tokens} "
            f"more than train.tokens={t.tokens}"
        )
    if cfg.eval.sample_tokens >= m.context:
        yield (
            f"eval.sample_tokens={cfg.eval.sample_tokens}: must be below "
            f"model.context={m.context}, which holds the prompt as well"
        )
    if "://" in cfg.run:
        yield f"run={cfg.run}: must be a local or mounted folder"
    if not cfg.data.sources:
        yield "data.sources=(): name at least one source"
    if not cfg.data.valid_sources and cfg.data.valid_fraction == 0:
        yield "data.valid_fraction=0.0: with no data.valid_sources there is nothing to validate on"
    needed = {"bytes": 258, "sentencepiece": cfg.tokenizer.vocab_size}[cfg.tokenizer.kind]
    if not cfg.tokenizer.path and m.vocab_size < needed:
        yield (
            f"model.vocab_size={m.vocab_size}: smaller than the tokenizer's {needed}; raise it "
            "(a multiple of 128 suits the hardware)"
        )


def _near(value: int, legal: Sequence[int]) -> str:
    below = [v for v in legal if v < value][-1:]
    above = [v for v in legal if v > value][:1]
    return " and ".join(map(str, below + above))


def _mesh_problems(cfg: Config, sizes: Mapping[str, int], processes: int) -> Iterator[str]:
    """Every dimension that a mesh axis would have to split and cannot."""
    m, t, tensor, fsdp = cfg.model, cfg.train, sizes["tensor"], sizes["fsdp"]
    rows = sizes["data"] * fsdp
    split = [
        ("tensor", tensor, "model.heads", m.heads),
        ("tensor", tensor, "model.kv_heads", m.kv),
        ("tensor", tensor, "model.mlp", m.hidden),
        ("tensor", tensor, "model.vocab_size", m.vocab_size),
        ("fsdp", fsdp, "model.embed", m.embed),
        ("data x fsdp", rows, "eval.batch", cfg.eval.batch),
    ]
    for axis, parts, name, size in split:
        if size % parts:
            yield (
                f"{name}={size}: mesh axis {axis}={parts} does not divide it; use "
                f"{_nearest_multiples(size, parts)}, or an axis of {_near(parts, _divisors(size))}"
            )
    if min(t.seq_len, t.accumulation) >= 1 and (micro := t.batch // t.accumulation) % rows:
        unit = rows * t.accumulation * t.seq_len
        yield (
            f"train.batch_tokens={t.batch_tokens}: the {micro} sequences of one "
            f"accumulation step are not divisible by mesh axes data x fsdp = {rows}; use "
            f"{_nearest_multiples(t.batch_tokens, unit)}"
        )
    if rows % processes and processes % rows:
        yield (
            f"mesh: data x fsdp = {rows} and {processes} processes do not divide each other, so "
            "no process has whole rows of the batch"
        )


# --- JSON ------------------------------------------------------------------------------------


def to_dict(cfg: Any) -> dict[str, Any]:
    """The configuration as nested dicts of JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def flatten(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Leaf values by dotted name."""
    leaves: dict[str, Any] = {}
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if dataclasses.is_dataclass(value):
            leaves |= flatten(value, f"{prefix}{f.name}.")
        else:
            leaves[prefix + f.name] = value
    return leaves


def from_dict(values: Mapping[str, Any], cls: type = Config, prefix: str = "") -> Any:
    """The inverse of `to_dict`. Absent fields take their defaults.

    Raises ConfigError naming every unknown field, with the nearest known ones, and every value of
    another type than its field's.
    """
    hints = typing.get_type_hints(cls)
    problems, known = [], {}
    for name, value in values.items():
        dotted = prefix + name
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=2)
            hint = (
                f"did you mean {' or '.join(prefix + n for n in near)}?"
                if near
                else (f"known here: {', '.join(hints)}")
            )
            problems.append(f"{dotted}: unknown field; {hint}")
        elif dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping):
                problems.append(f"{dotted}={value!r}: must be an object of fields")
                continue
            try:
                known[name] = from_dict(value, hints[name], f"{dotted}.")
            except ConfigError as error:
                problems += error.problems
        else:
            try:
                known[name] = _coerce(value, hints[name])
            except TypeError as error:
                problems.append(f"{dotted}={value!r}: {error}")
    if problems:
        raise ConfigError(problems)
    return cls(**known)


def _coerce(value: Any, hint: Any) -> Any:
    """A JSON value as the type of its field. Raises TypeError with what was wanted."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in args:
            return value
        raise TypeError(f"must be one of {', '.join(map(str, args))}")
    if origin is types.UnionType:
        if value is None and types.NoneType in args:
            return None
        return _coerce(value, next(a for a in args if a is not types.NoneType))
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError("must be a list")
        return tuple(_coerce(item, args[0]) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise TypeError(f"must be of type {hint.__name__}")
    return value


# --- loading ---------------------------------------------------------------------------------


def load(argument: str) -> Config:
    """The configuration that a CONFIG argument names. Raises ConfigError."""
    path, _, function = argument.partition(":")
    file = Path(path)
    if file.is_dir():
        file = file / CONFIG_FILE
        if not file.exists():
            raise ConfigError([f"{path}: this folder holds no {CONFIG_FILE}, so it is no run"])
    if not file.exists():
        shelf = file.parent if file.parent.is_dir() else Path("configs")
        near = difflib.get_close_matches(
            file.name, [p.name for p in shelf.glob("*.py")], n=2, cutoff=0.4
        )
        hint = f"; did you mean {' or '.join(str(shelf / n) for n in near)}?" if near else ""
        raise ConfigError([f"{path}: no such file{hint}"])
    if file.suffix == ".json":
        return read_json(file)
    if file.suffix == ".py":
        return _preset(file, function or "main")
    raise ConfigError([f"{path}: a CONFIG is a .py preset, a .json file or a run folder"])


def read_json(file: Path) -> Config:
    """Reads a resolved configuration. Raises ConfigError."""
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError([f"{file}: cannot be read as JSON: {error}"]) from None
    if not isinstance(values, Mapping):
        raise ConfigError([f"{file}: must hold an object of fields"])
    return from_dict(values)


def _preset(file: Path, function: str) -> Config:
    spec = importlib.util.spec_from_file_location(f"gptjax_preset_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    presets = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, types.FunctionType)
        and value.__module__ == module.__name__
        and not name.startswith("_")
    }
    if function not in presets:
        near = difflib.get_close_matches(function, presets, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(presets)}"
        raise ConfigError([f"{file}:{function}: no such preset; {hint}"])
    return presets[function]()


def resolve(argument: str, overrides: Sequence[str], prog: str, description: str = "") -> Config:
    """The configuration of a command line: CONFIG, then `--section.field value` overrides.

    tyro parses the overrides; at a mistake it prints what is wrong and the nearest right names,
    and exits with status 2.
    """
    preset = load(argument)
    if not overrides:
        return preset
    import tyro

    return tyro.cli(
        Config,
        default=preset,
        args=overrides,
        prog=f"{prog} {argument}",
        description=description,
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )


def provenance(cfg: Config, argument: str, overrides: Sequence[str]) -> dict[str, str]:
    """Where each leaf came from, by dotted name: default, the preset's name, or command line."""
    given = {word[2:].split("=")[0].replace("-", "_") for word in overrides if word[:2] == "--"}
    defaults, preset = flatten(Config()), flatten(load(argument))
    return {
        name: "command line"
        if name in given
        else argument
        if preset[name] != defaults[name]
        else "default"
        for name in flatten(cfg)
    }


# --- resuming --------------------------------------------------------------------------------


def resume_classes(cls: type = Config, prefix: str = "") -> dict[str, str]:
    """Class of each leaf (identity, schedule or free), by dotted name."""
    classes: dict[str, str] = {}
    for f in dataclasses.fields(cls):
        inner = typing.get_type_hints(cls)[f.name]
        if dataclasses.is_dataclass(inner):
            classes |= resume_classes(inner, f"{prefix}{f.name}.")
        else:
            classes[prefix + f.name] = f.metadata["resume"]
    return classes


def resume_changes(saved: Config, given: Config) -> list[str]:
    """What a resume with `given` changes of the run that `saved` started, a line each.

    Raises MismatchError with all changes of identity fields, which make it another run.
    """
    classes, old, new = resume_classes(), flatten(saved), flatten(given)
    changed = [name for name in old if old[name] != new[name] and name != "run"]
    refused = [
        f"{name}: {old[name]!r} in the run, {new[name]!r} given"
        for name in changed
        if classes[name] == "identity"
    ]
    if refused:
        raise MismatchError(
            f"{given.run} holds another run; give its values, or another --run", refused
        )
    return [f"{name}: {old[name]!r} -> {new[name]!r} ({classes[name]})" for name in changed]
