"""Configuration schema: nested frozen dataclasses, one for each section.

The docstring under a field is its entry in the configuration reference and in --help.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from gptjax.config import phases, validation
from gptjax.config.field import free, identity, schedule, stage
from gptjax.config.mesh import MeshConfig
from gptjax.config.model import ModelConfig
from gptjax.errors import ConfigError

TokenizerKind = Literal["bytes", "sentencepiece", "huggingface"]


@dataclass(frozen=True)
class ComputeConfig:
    """How the model is computed. Only dtype changes the results, beyond rounding."""

    dtype: Literal["float32", "bfloat16"] = schedule("float32")
    """Type of activations and matrix products; parameters and optimizer state are float32."""
    attention: str = free("auto")
    """Attention backend: auto (the fastest that supports the model on this device), reference,
    native, blockwise, ring, splash, cudnn, cudnn_ring, or a name in config/registry.py."""
    scan_layers: bool = free(True)
    """Compile one block and scan it over the layers, which compiles faster; otherwise unroll all
    layers, which may run faster."""
    remat: Literal["none", "block", "dots"] = free("none")
    """Rematerialisation (activation checkpointing): recompute nothing, whole blocks, or all but the
    matrix products and the output of splash and cuDNN attention (dots) in the backward pass."""
    microbatches: int = free(0)
    """With mesh.stage: number of microbatches that pass through the pipeline in each accumulation
    step, a multiple of the stages. 0: as many as stages. More of them shorten the pipeline
    bubble."""
    rounds: int = free(1)
    """With mesh.stage: number of virtual stages on each device (the interleaved, or circular,
    schedule). 1: plain GPipe. More of them shorten the pipeline bubble and send more."""
    deterministic: bool = free(False)
    """On GPUs, use only kernels that give the same bits each time, chosen without timing them:
    slower. Nothing changes on CPUs and TPUs, which give the same bits anyway."""
    loss_chunks: int = free(1)
    """Number of chunks in which logits and loss are computed, to save memory; lowered to a divisor
    of a device's tokens where it is none."""


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer: loaded from a file, or trained when the token store is prepared."""

    kind: TokenizerKind = identity("sentencepiece")
    """Raw UTF-8 bytes, a SentencePiece model, or Hugging Face's tokenizer.json."""
    path: str = identity("")
    """The .model or tokenizer.json file to load, or its folder. Special tokens are those that the
    files beside tokenizer.json declare. Empty: train a tokenizer on the training documents."""
    algorithm: Literal["bpe", "unigram", "byte_bpe", "wordpiece"] = identity("bpe")
    """Algorithm to train: bpe or unigram with kind=sentencepiece; byte_bpe (GPT-2's byte-level BPE)
    or wordpiece (BERT's, which does not preserve spaces) with kind=huggingface."""
    vocab_size: int = identity(4096)
    """Vocabulary size of a trained tokenizer, special tokens included."""
    sample_bytes: int = identity(10_000_000)
    """Text to train the tokenizer on, in bytes: slices from all over the training documents."""


@dataclass(frozen=True)
class MixturePart:
    """A part of a mixture of data, with a token store of its own."""

    weight: float = identity(1.0)
    """Share of the training tokens, relative to the weights of the other parts; above 0."""
    sources: tuple[str, ...] = identity(())
    """Training text of the part, as in data.sources."""
    valid_sources: tuple[str, ...] = identity(())
    """Validation text of the part, as in data.valid_sources."""
    text_field: str = identity("")
    """Field of the part's records that holds the text. Empty: data.text_field."""
    epochs: float = identity(0.0)
    """The part is used for at most this many passes over its training text; data.exhausted says
    what then happens. 0: no limit."""
    store: str = free("")
    """Folder of the part's token store, which several runs may share. Empty: one named after the
    part in data.store."""


@dataclass(frozen=True)
class DataConfig:
    """Data sources, the token store and the input pipeline."""

    sources: tuple[str, ...] = identity(("python-library",))
    """Training text: paths, folders or quoted globs; tfds:NAME@SPLIT or tfds:FOLDER@SPLIT;
    python-library, the source files of the running Python; or a registered scheme
    (config/registry.py). JSON lines, Parquet, Arrow and CSV files have one document in each record,
    a text file is one document. gzip, xz, bzip2, Zstandard, tar and zip files are opened. What a
    file is, its first bytes tell before its name; a file that is none of these is refused."""
    valid_sources: tuple[str, ...] = identity(())
    """Validation text, as in sources; what is in it is not trained on. Empty: valid_fraction of the
    sources' documents is held out."""
    valid_fraction: float = identity(0.02)
    """Fraction of the documents that is held out for validation, at least 0 and below 1, chosen by
    a hash of each document's text. At least one document is; of a single one, its end."""
    mixture: Mapping[str, MixturePart] = identity(dict)
    """A weighted mixture, by the names of its parts, in place of sources and valid_sources:
    `--data.mixture.NAME.sources PATH --data.mixture.NAME.weight 0.7`. Each batch has each part's
    share of its rows."""
    exhausted: Literal["renormalize", "stop"] = identity("renormalize")
    """Where a part of the mixture has been used for its epochs: the weights of the others are
    scaled up, or the run ends there. It is told at the start."""
    text_field: str = identity("text")
    """Field of JSON lines, tables and TFDS records that holds the text."""
    store: str = free("data/store")
    """Folder of the token store, which is prepared if missing. It may move: a run identifies its
    tokens by their fingerprint."""
    cache_gb: float = free(20.0)
    """Disk that copies of token stores in buckets may take on this machine, in GB. 0: none."""
    cache: str = free("~/.cache/gptjax/stores")
    """Folder of these copies, on this machine; its processes and runs may share it. Empty: none.
    Stores that are prepared for a bucket are made in it too."""
    documents: Literal["ignore", "mask"] = identity("ignore")
    """Document boundaries within a window: ignore lets attention cross them; mask does not, and
    restarts positions at each document."""
    packing: Literal["windows", "documents"] = identity("windows")
    """What a row of a batch holds: a window of the stream of all documents, or whole documents by
    best fit (documents), where a row ends in padding if no document fits, and only documents longer
    than a row are cut. The latter requires documents=mask."""
    max_document_bytes: int = identity(64_000_000)
    """Longest document, in bytes. A longer text file is tokenized in parts, cut at line ends; a
    longer record is an error."""
    bad_utf8: Literal["replace", "fail"] = identity("replace")
    """Invalid UTF-8 and NULs: replaced by U+FFFD and counted, or an error that names its place."""
    bad_records: Literal["refuse", "skip"] = identity("refuse")
    """Records whose text is missing or is no text, such as null: an error that names the record,
    or skipped and counted."""
    workers: int = free(0)
    """Number of tokenizing processes. 0: one for each core."""
    prefetch: int = free(32)
    """Number of batches that the input pipeline prefetches."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule. Lengths are in tokens."""

    name: str = identity("adamw")
    """Optimizer: adamw, adafactor, lion, muon (for matrices, with adamw for other parameters), or a
    registered name (config/registry.py)."""
    lr: float = schedule(6e-4)
    """Peak learning rate."""
    lr_schedule: Literal["cosine", "wsd", "linear", "inverse_sqrt", "constant"] = schedule("cosine")
    """Learning-rate schedule after the warm-up. cosine and linear decay and are then constant; wsd
    (warm-up, stable, decay) is constant and decays at the end; inverse_sqrt falls with the square
    root of the step."""
    warmup_tokens: int = schedule(0)
    """Length of the linear warm-up from zero, in tokens; at most train.tokens."""
    decay_tokens: int = schedule(0)
    """Length of the decay, in tokens: with cosine and linear from the warm-up on (0: to the end),
    with wsd at the end."""
    decay_shape: Literal["linear", "1-sqrt"] = schedule("linear")
    """With wsd: the decay falls linearly, or by one minus the square root of its progress."""
    final_lr_ratio: float = schedule(0.1)
    """Final learning rate as a fraction of the peak."""
    b1: float = schedule(0.9)
    """Decay rate of the first moment, or the momentum of lion and muon; at least 0 and below 1."""
    b2: float = schedule(0.95)
    """Decay rate of the second moment; at least 0 and below 1."""
    eps: float = schedule(1e-8)
    """Epsilon added to the square root of the second moment."""
    weight_decay: float = schedule(0.1)
    """Decoupled weight decay, applied to matrices only."""
    clip: float = schedule(1.0)
    """Gradient clipping by the global norm of all gradients. 0: no clipping."""


@dataclass(frozen=True)
class TuneConfig:
    """Trainable parameters and their learning rates, for training from given parameters."""

    freeze: tuple[str, ...] = identity(())
    """Frozen parameters: regular expressions that match whole parameter paths, such as embed or
    blocks/.*/mlp/.*"""
    freeze_layers: int = identity(0)
    """Number of lowest layers that are frozen, from 0 to model.layers; freeze decides for the
    embeddings."""
    layer_decay: float = schedule(1.0)
    """Layer-wise learning-rate decay (Clark et al. 2020): each layer's rate is this times the rate
    of the layer above, and the embeddings count as the lowest layer. Above 0 and at most 1; 1: no
    decay."""


@dataclass(frozen=True)
class LoraConfig:
    """LoRA: low-rank adapters of frozen matrices (Hu et al. 2021)."""

    rank: int = identity(0)
    """Rank of the adapters. 0: no adapters, the matrices themselves are trained."""
    alpha: float = identity(16.0)
    """Scaling numerator: an adapter's output is multiplied by alpha / rank; above 0."""
    rslora: bool = identity(False)
    """Multiply by alpha / sqrt(rank) instead, which suits high ranks (Kalajdzievski 2023)."""
    targets: tuple[str, ...] = identity(("blocks/.*/attn/(q|v)",))
    """Matrices that get adapters: regular expressions that match whole parameter paths."""

    @property
    def scale(self) -> float:
        """The multiplier of an adapter's output."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True)
class TrainConfig:
    """Training budget, batch and loss."""

    seed: int = identity(0)
    """Seed of initialisation, data order, dropout and samples; from 0 to 2**32 - 1."""
    tokens: int = schedule(2_500_000_000)
    """Training budget, in tokens."""
    batch_tokens: int = identity(524_288)
    """Global batch of an optimizer step, in tokens, over all devices and accumulation steps; a
    multiple of seq_len."""
    batch_ramp_tokens: int = identity(0)
    """The batch grows to batch_tokens over the first tokens, so many (Brown et al. 2020): in equal
    steps, each as long as the others in tokens. 0: it has its full size from the first step."""
    batch_start_tokens: int = identity(0)
    """With batch_ramp_tokens: the first batch, in tokens; a multiple of seq_len."""
    batch_increment_tokens: int = identity(0)
    """With batch_ramp_tokens: what each step of the growth adds, in tokens; a multiple of seq_len.
    Each size of a batch is compiled by itself, so few are better."""
    seq_len: int = identity(1024)
    """Length of a training window, in tokens; at most model.context."""
    accumulation: int = free(1)
    """Gradient accumulation: number of sequential steps into which each batch of batch_tokens is
    split to save memory; divides its sequences. Other batches, of a growing batch or of a stage,
    are split so that no more tokens are on a device at a time."""
    z_loss: float = schedule(0.0)
    """Weight of the z-loss, the squared log-partition (PaLM, section 5)."""
    ema_decay: float = identity(0.0)
    """Decay of the exponential moving average (EMA) of the parameters, below 1. 0: no average."""
    nonfinite_limit: int = free(3)
    """Number of consecutive steps with a non-finite loss or gradient after which the run ends; such
    steps leave the parameters unchanged."""
    leave_out: tuple[str, ...] = free(())
    """Steps whose batches are not trained on, counted from 1: 57, or 41-44. They stay left out in
    the run; each must lie beyond the checkpoint that the run goes on from."""
    check_replicas: int = free(0)
    """Number of steps between comparisons of the copies of each array on the devices that hold the
    same part of it, and before each save then; a difference ends the run, unsaved. 0: never."""

    @property
    def batch(self) -> int:
        """Sequences in an optimizer step."""
        return self.batch_tokens // self.seq_len


@dataclass(frozen=True)
class StageConfig:
    """A stage of training; what it does not give is as the other sections have it."""

    tokens: int = stage(0)
    """Length of the stage, in tokens; together the stages have train.tokens. 0, in one stage only:
    what the others leave of train.tokens."""
    weights: Mapping[str, float] = stage(dict)
    """Weights of the mixture's parts in the stage, by their names; a part that is not named is not
    used. Empty: those of data.mixture."""
    seq_len: int = stage(0)
    """Length of a training window, in tokens. 0: train.seq_len."""
    batch_tokens: int = stage(0)
    """Global batch of an optimizer step, in tokens. 0: train.batch_tokens."""
    lr_schedule: Literal["optim", "constant", "linear", "cosine", "1-sqrt"] = stage("optim")
    """Learning rate in the stage: as the section optim has it at these tokens (optim), or constant,
    or a straight line, a cosine or one minus the square root of the progress, from lr_ratio to
    final_lr_ratio."""
    lr_ratio: float | None = stage(None)
    """Learning rate at the beginning of the stage, as a fraction of optim.lr. None: that at which
    the stage before ends, or optim.lr in the first one."""
    final_lr_ratio: float = stage(0.0)
    """Learning rate at the end of the stage, as a fraction of optim.lr, unless it is constant."""
    rope_theta: float = stage(0.0)
    """Base of the rotation frequencies in the stage. 0: model.rope.theta."""
    rope_scaling: Literal["model", "none", "linear", "low_frequency", "yarn"] = stage("model")
    """Scaling of the rotary positions in the stage. model: model.rope.scaling."""
    rope_factor: float = stage(0.0)
    """Ratio of the scaled context to the original one in the stage. 0: model.rope.factor."""


@dataclass(frozen=True)
class StartConfig:
    """The model that pre-training goes on from (a warm start), in a run folder of its own."""

    base: str = identity("")
    """Run folder, RUN@STEP or hf:FOLDER whose parameters the run starts from, a run's moving
    average where it keeps one; `--start BASE` on the command line. Model and tokenizer are those of
    the base. Empty: parameters are drawn."""
    optimizer: bool = identity(False)
    """Take the base's parameters as they are, without averaging, and its optimizer state and moving
    average with them. The base is a pre-trained run with the same optimizer."""
    keep_step: bool = identity(False)
    """Go on counting steps from the base's: the learning-rate schedule and the order of the data go
    on where it was, and train.tokens includes the tokens that it was trained on. Requires
    start.optimizer."""


@dataclass(frozen=True)
class FinetuneConfig(TuneConfig):
    """Supervised fine-tuning of a pre-trained model; `gptjax finetune` sets these fields.

    The defaults are those of GPT-1 (Radford et al. 2018).
    """

    task: Literal["none", "classify", "choose", "answer"] = identity("none")
    """Task: the label of a text or of a pair of texts (classify), the right one of several choices
    (choose), or an answer in free text (answer). none: this run is a pre-training."""
    base: str = identity("")
    """Base model: a run folder, or hf:FOLDER."""
    data: str = identity("")
    """File of training examples, one JSON object a line."""
    valid: str = identity("")
    """File of validation examples, one JSON object a line."""
    epochs: int = schedule(3)
    """Number of passes over the training examples; decides train.tokens unless that is given."""
    lm_weight: float = schedule(0.5)
    """With classify and choose: weight of the auxiliary language-modelling loss on the examples."""
    dropout: float = schedule(0.1)
    """With classify and choose: dropout rate of the hidden state that the task head reads."""
    labels: tuple[str, ...] = identity(())
    """With classify: the labels, in the order of the task head's outputs; taken from the data."""
    lora: LoraConfig = free(LoraConfig)

    @property
    def outputs(self) -> int:
        """Outputs of the task head; 0 for tasks without one."""
        return {"classify": len(self.labels), "choose": 1}.get(self.task, 0)


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation and samples during training. Periods are in steps; 0: only at the end."""

    every: int = free(500)
    """Steps between evaluations on the validation split. 0: only at the end."""
    batch: int = free(32)
    """Sequences in an evaluation batch."""
    tasks: tuple[str, ...] = free(())
    """Evaluation tasks, each KIND:FILE, as `gptjax eval --task` takes them."""
    tasks_every: int = free(0)
    """Steps between evaluations on the tasks. 0: only at the end."""
    task_limit: int = free(0)
    """Number of examples of each task, from the beginning of its file. 0: all."""
    sample_every: int = free(0)
    """Steps between samples. 0: only at the end."""
    prompts: tuple[str, ...] = free(("",))
    """Prompts that the samples continue."""
    sample_tokens: int = free(128)
    """Longest sample, in tokens; below model.context."""
    temperature: float = free(0.8)
    """Temperature of the samples. 0: greedy."""
    top_p: float = free(0.95)
    """Nucleus (top-p) of the samples, above 0 and at most 1."""


@dataclass(frozen=True)
class SpikeConfig:
    """Rewinding after spikes of loss or gradient norm. All but threshold and rewinds in steps."""

    threshold: float = free(0.0)
    """Deviations above the median of the steps before, beyond which loss or gradient norm is a
    spike, as is one that is not finite: the run goes back to the newest checkpoint before the steps
    that are left out. A deviation is 1.4826 x the median absolute deviation. 0: never."""
    window: int = free(100)
    """Steps that the median is of."""
    before: int = free(5)
    """Steps before a spike that are left out with it."""
    after: int = free(5)
    """Steps after a spike that are left out with it."""
    rewinds: int = free(5)
    """Rewinds of a run, after which the next spike ends it with exit code 70."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints. Periods are in steps."""

    every: int = free(500)
    """Steps between checkpoints; one is also saved at the end and at preemption."""
    keep: int = free(2)
    """Number of newest checkpoints that are kept."""
    keep_every: int = free(0)
    """Checkpoints at multiples of this many steps are kept permanently. 0: none."""
    local: str = free("")
    """Folder on each machine's own disk, or in its memory (/dev/shm), for checkpoints between those
    of a run in a bucket. Empty: none."""
    local_every: int = free(50)
    """Steps between checkpoints on the machines' own disks."""
    local_keep: int = free(1)
    """Number of newest checkpoints that are kept there."""
    upload_mb_s: float = free(0.0)
    """Megabytes a second that each process sends to a bucket while it saves. 0: no limit."""


@dataclass(frozen=True)
class LogConfig:
    """Metrics, profiles and the compilation cache."""

    every: int = free(10)
    """Steps between logged metrics."""
    tensorboard: bool = free(True)
    """Write TensorBoard event files beside metrics.jsonl."""
    writers: tuple[str, ...] = free(())
    """Further metric writers, by their registered names (config/registry.py)."""
    peak_tflops: float = free(0.0)
    """Peak of one device in TFLOP/s, for the MFU. 0: from the table of known devices."""
    profile_start: int = free(0)
    """Step at which jax.profiler begins to trace. 0: never."""
    profile_steps: int = free(3)
    """Number of steps in a trace."""
    profile_slow: float = free(0.0)
    """Trace the steps after one that took so many times the median, up to three times. 0: never."""
    dump_hlo: bool = free(False)
    """Write the compiled program of each train step into RUN/hlo/, as text."""
    metrics_port: int = free(0)
    """Port of 127.0.0.1 where Prometheus gets the newest metrics (extra serve). 0: none."""
    compile_cache: str = free("~/.cache/gptjax/xla")
    """Folder of the persistent compilation cache. Empty: no cache."""


@dataclass(frozen=True)
class WatchConfig:
    """The hang watchdog: deadlines in seconds, after which a run ends itself with exit code 69, so
    that a scheduler starts it again. 0: no deadline."""

    lost: int = free(60)
    """Heartbeat timeout: with several processes, one without a heartbeat for this long is dead."""
    restore: int = free(3600)
    """Deadline for claiming the run folder, agreeing on it and restoring the newest checkpoint."""
    compile: int = free(7200)
    """Deadline for compiling the step, the first batch included."""
    data: int = free(900)
    """Deadline for a batch from the input pipeline."""
    step: int = free(1800)
    """Deadline for a step on the devices, any compilation within it included."""
    save: int = free(3600)
    """Deadline for the part of saving a checkpoint that the training loop waits for."""
    eval: int = free(14400)
    """Deadline for the evaluation and samples of one step."""
    straggler: float = free(0.1)
    """Share by which a process may be slower than the median of all at reading, saving or
    evaluating, or a device at products, before process 0 names it. 0: never."""
    audit_every: int = free(0)
    """Steps between those that are computed twice and compared bit for bit, on every device: a
    difference ends the run, unsaved, with exit code 76. Needs memory for the state once more, and
    on GPUs compute.deterministic. 0: never."""


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run."""

    run: str = free("runs/default")
    """Run folder: holds configuration, tokenizer, checkpoints and metrics."""
    model: ModelConfig = free(ModelConfig)
    compute: ComputeConfig = free(ComputeConfig)
    mesh: MeshConfig = free(MeshConfig)
    tokenizer: TokenizerConfig = free(TokenizerConfig)
    data: DataConfig = free(DataConfig)
    optim: OptimConfig = free(OptimConfig)
    train: TrainConfig = free(TrainConfig)
    stages: Mapping[str, StageConfig] = stage(dict)
    """Stages of pre-training, by their names and in this order: `--stages.NAME.tokens 1000000`.
    `--stages none` leaves out those of a preset."""
    start: StartConfig = free(StartConfig)
    finetune: FinetuneConfig = free(FinetuneConfig)
    eval: EvalConfig = free(EvalConfig)
    spike: SpikeConfig = free(SpikeConfig)
    checkpoint: CheckpointConfig = free(CheckpointConfig)
    log: LogConfig = free(LogConfig)
    watch: WatchConfig = free(WatchConfig)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole budget."""
        return phases.phases(self)[-1].last

    @property
    def drops(self) -> bool:
        """Whether training uses dropout anywhere."""
        return self.model.dropout > 0 or (self.finetune.outputs > 0 and self.finetune.dropout > 0)

    def check(self, devices: int | None = None, processes: int = 1) -> None:
        """Checks that the values are legal together, and on `devices` devices if given.

        Raises ConfigError with all problems at once.
        """
        problems = [*validation.value_problems(self)]
        if devices is not None:
            try:
                problems += validation.mesh_problems(self, self.mesh.shape(devices), processes)
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems)
