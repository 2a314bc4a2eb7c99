"""A warm start: pre-training that begins with the parameters of another run or of a Hugging Face
folder, and perhaps with a run's optimizer state.

RUN/start.json   what the run was started from: base, step, the fingerprint of its parameters

A run that has a checkpoint needs its base no more.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptjax import bucket, config, load_model
from gptjax import tokenizer as tokenizers
from gptjax.checkpoint import run_dir
from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.checkpoint.fingerprint import fingerprints, sha256_of
from gptjax.config import CONFIG_FILE, Config, ModelConfig, phases
from gptjax.data import store
from gptjax.errors import CheckpointError, ConfigError, DataError, MismatchError
from gptjax.finetune.base_model import BaseModel
from gptjax.model import decoder, heads
from gptjax.parallel import sharding
from gptjax.param_tree import Tree, leaves_by_path
from gptjax.tokenizer import Tokenizer
from gptjax.training.step import TrainState, create_state, state_of

_MAY_CHANGE = (
    *("vocab_size", "vocab_multiple", "context", "dropout", "rope."),
    *("moe.capacity", "moe.balance_loss", "moe.router_z_loss"),
)
"""Fields of a model that another value than the base's leaves its parameters usable with."""


# --- the configuration ---------------------------------------------------------------------------


def with_base(
    cfg: Config,
    argument: str,
    overrides: Sequence[str],
    prog: str = "gptjax",
    description: str = "",
) -> Config:
    """What `config.resolve` makes of a command line, `cfg`, with the model of `start.base`.

    Where CONFIG is a preset, or --start is given, model and tokenizer are those of the base, and
    overrides change them. A run that was begun with the same base has them itself. Raises
    ConfigError, and what `find_base` raises.
    """
    named = any(word.startswith("--start.base") for word in config.in_full(overrides))
    if not cfg.start.base or (config.is_resolved(argument) and not named):
        return cfg
    begun = bucket.path_of(cfg.run) / CONFIG_FILE
    if begun.exists() and (of_run := config.read_json(begun)).start.base == cfg.start.base:
        model, tokenizer = of_run.model, of_run.tokenizer
    else:
        base = find_base(cfg.start.base)
        model, tokenizer = base.cfg.model, cfg.tokenizer
        if cfg.stages and not base.path.startswith("hf:"):
            model = run_dir.open_run(base.path)[0].model  # and each stage stretches its own
        if base.tokenizer is not None:
            folder = base.path.removeprefix("hf:")
            tokenizer = load_model.tokenizer_config(base.tokenizer, folder)
    based = replace(config.load(argument), model=model, tokenizer=tokenizer, start=cfg.start)
    cfg = config.override(based, overrides, f"{prog} {argument}", description)
    if cfg.tokenizer != tokenizer and cfg.tokenizer.path:
        pieces = tokenizers.make(cfg.tokenizer, ()).vocab_size
        more = max(cfg.model.vocab_size, pieces)
        cfg = replace(cfg, model=replace(cfg.model, vocab_size=more))
    return cfg


# --- the base ------------------------------------------------------------------------------------


def find_base(name: str) -> BaseModel:
    """The model of RUN, RUN@STEP or hf:FOLDER. Touches no device.

    Raises ConfigError for a folder that is not found and for adapters without their base,
    CheckpointError for a run without the checkpoint.
    """
    path, at, step = name.rpartition("@")
    if not at or not step.isdecimal() or name.startswith("hf:") or Path(name).exists():
        path, step = name, ""
    if path.startswith("hf:"):
        return load_model.find_model(path)
    load_model.check_exists(path)
    if load_model.is_hugging_face(path):
        raise ConfigError([f"start.base={path}: is a Hugging Face folder; give hf:{path}"])
    base = load_model.find_model(path)
    if base.cfg.finetune.lora.rank:
        raise ConfigError(
            [
                f"start.base={name}: has adapters beside a base; merge them: "
                f"gptjax convert {path} NEW"
            ]
        )
    steps = Checkpointer(bucket.path_of(path) / run_dir.CHECKPOINTS).steps()
    if not steps:
        raise CheckpointError(f"start.base={name}: this run has no checkpoint yet")
    if step and int(step) not in steps:
        have = ", ".join(map(str, steps))
        raise CheckpointError(f"start.base={name}: no checkpoint of that step; available: {have}")
    return base.at_step(int(step)) if step else base


@dataclass(frozen=True)
class WarmStart:
    """The base of a run that is to be begun.

    `pieces` is the size of the run's tokenizer, of which the last `added` are new to the base.
    """

    cfg: Config
    base: BaseModel
    pieces: int
    added: int

    @classmethod
    def find(cls, cfg: Config, say: Callable[[str], None]) -> "WarmStart | None":
        """The configured base, compared with the configuration; None where none is needed.

        Touches no device. Raises ConfigError for a model or an optimizer that does not go with the
        base's, MismatchError for another tokenizer, DataError where a run has lost its start.json.
        """
        if not cfg.start.base:
            return None
        if Checkpointer(bucket.path_of(cfg.run) / run_dir.CHECKPOINTS).steps():
            if run_dir.start_of(cfg.run) is None:
                raise DataError(f"{cfg.run}: its {run_dir.START} is missing; put it back")
            return None
        base = find_base(cfg.start.base)
        begun = run_dir.start_of(cfg.run)
        if begun is not None and base.step is None and begun["base"].startswith(f"{base.path}@"):
            base = find_base(begun["base"])  # it may have gone on since
        problems = [*_model_problems(cfg, base), *_optimizer_problems(cfg, base)]
        if problems:
            raise ConfigError(problems)
        for change in _changes(base.cfg.model, cfg.model):
            say(f"model.{change}")
        pieces, added = _pieces(cfg, base, say)
        if cfg.start.optimizer and added:
            raise ConfigError(
                [
                    f"start.optimizer=True: the {added} pieces that are new have no optimizer "
                    "state; set it to False"
                ]
            )
        return cls(cfg, base, pieces, added)

    def check_steps(self, cfg: Config) -> None:
        """Raises DataError where a mixture's text ends before steps that go on from the base's."""
        if not cfg.start.keep_step or cfg.steps > (step := first_step(self.base)):
            return
        raise DataError(
            f"data.mixture: has text for {cfg.steps} steps, and {self.base.path} has done "
            f"{step}, which count with start.keep_step; raise the parts' epochs"
        )

    def state(
        self, order: Sequence[int] | None, place: Callable[[Tree], Tree], say: Callable[[str], None]
    ) -> TrainState:
        """The state to begin with, on the ambient mesh; records what it was started from.

        `order` is that of the layers in a pipeline, as in `Checkpointer`, and `place` puts the
        model's parameters into it. Raises MismatchError where the base is no longer the one that
        the run was begun with, and CheckpointError.
        """
        shards, rows = sharding.axis_size("vocab"), self.base.cfg.model.table
        if rows % shards:
            raise ConfigError(
                [
                    f"mesh.tensor={shards}: does not divide the {rows} rows of the base's table of "
                    "embeddings, which is read as it is; begin with mesh.tensor=1 (a resume may "
                    "have another mesh)"
                ]
            )
        if self.cfg.start.optimizer:
            return self._state_of_base(order, say)
        params, step = self.base.read_params(say)
        params = {name: leaves for name, leaves in params.items() if name != heads.NAME}
        self._record(fingerprints(leaves_by_path(params)), step, say)
        params = place(jax.jit(self._with_rows, donate_argnums=0)(params))
        return state_of(self.cfg, params)

    def _record(
        self, parameters: Mapping[str, Any], step: int | None, say: Callable[[str], None]
    ) -> None:
        """Tells and records what the run is started from; `parameters` are their fingerprints."""
        name = self.base.path + ("" if step is None else f"@{step}")
        facts = {"base": name, "parameters_sha256": sha256_of(parameters)}
        run_dir.record_start(self.cfg.run, facts)
        what = ", with its optimizer state" if self.cfg.start.optimizer else ""
        say(f"starts from {name}{what} (parameters {facts['parameters_sha256'][:12]})")

    def _with_rows(self, params: Tree) -> Tree:
        """The base's parameters, with rows for all of this model's vocabulary.

        A row that is new is the mean of the others (Hewitt 2021), so that it is not likely from the
        beginning: those of added pieces, and those beyond the base's vocabulary.
        """
        model, theirs = self.cfg.model, self.base.cfg.model
        known = self.pieces - self.added if self.added else theirs.vocab_size

        def grown(old_VD: jax.Array) -> jax.Array:
            axes = jax.typeof(old_VD).sharding.spec
            by_column = jax.P(None, axes[1])
            rows_VD = jax.sharding.reshard(old_VD, by_column)[: model.table]
            shape = model.table - len(rows_VD), old_VD.shape[1]
            more_VD = jnp.zeros(shape, old_VD.dtype, out_sharding=by_column)
            mean_1D = rows_VD[:known].mean(0, keepdims=True)
            ids_V1 = jnp.arange(model.table)[:, None]
            added_V1 = (ids_V1 >= known) & (ids_V1 < self.pieces)
            beyond_V1 = (ids_V1 >= theirs.vocab_size) & (ids_V1 < model.vocab_size)
            whole_VD = jnp.concatenate([rows_VD, more_VD])
            new_V1 = beyond_V1 | added_V1 if self.added else beyond_V1
            return jax.sharding.reshard(jnp.where(new_V1, mean_1D, whole_VD), axes)

        tables = {name: params[name] for name in ("embed", "head") if name in params}
        sizes = lambda m: (m.vocab_size, m.table)
        if not self.added and sizes(model) == sizes(theirs):
            return params
        return params | {name: grown(table_VD) for name, table_VD in tables.items()}

    def _state_of_base(self, order: Sequence[int] | None, say: Callable[[str], None]) -> TrainState:
        """The state of the base's checkpoint; records what it is."""
        cfg, theirs = self.cfg, self.base.cfg
        init = lambda key: decoder.init(cfg.model, key)
        abstract = sharding.abstract(lambda: create_state(cfg, init))
        wanted = {name: getattr(abstract, name) for name in ("step", "params", "opt_state")}
        averages = bool(cfg.train.ema_decay and theirs.train.ema_decay)
        if averages:
            wanted["ema"] = abstract.ema
        checkpoints = Checkpointer(
            bucket.path_of(self.base.path) / run_dir.CHECKPOINTS, say=say, order=order
        )
        restored: Any
        if self.base.step is None:
            restored = checkpoints.restore_newest(wanted, partial=True)
        else:
            restored = checkpoints.restore(self.base.step, wanted, partial=True)
        saved = checkpoints.meta(int(restored["step"]))["fingerprints"]  # in any layers' order
        own = {path: value for path, value in saved.items() if path.startswith("params/")}
        self._record(own, int(restored["step"]), say)
        if not cfg.start.keep_step:
            # The schedule begins anew; the moments go on, and so does their bias correction.
            zero = lambda tree: jax.tree.map(jnp.zeros_like, tree)
            restored["step"] = zero(restored["step"])
            restored["opt_state"]["rate"] = zero(restored["opt_state"]["rate"])
        ema = restored.get("ema")
        if cfg.train.ema_decay and ema is None:
            ema = jax.tree.map(jnp.copy, restored["params"])
        return TrainState(
            step=restored["step"],
            params=restored["params"],
            opt_state=restored["opt_state"],
            ema=ema,
            nonfinite=jnp.zeros_like(restored["step"]),
        )


# --- what does not go together -------------------------------------------------------------------


def _changes(base: ModelConfig, given: ModelConfig) -> Iterator[str]:
    """The model's fields that differ from the base's, as NAME: OLD in the base, NEW here."""
    ours, theirs = config.flatten(given), config.flatten(base)
    for name, value in ours.items():
        if value != theirs[name]:
            yield f"{name}: {theirs[name]!r} in the base, {value!r} here"


def _model_problems(cfg: Config, base: BaseModel) -> Iterator[str]:
    """Problems of a model that the base's parameters do not suit."""
    model = base.cfg.model
    for change in _changes(model, cfg.model):
        learned = change.startswith("context") and model.positions == "learned"
        if learned or not change.startswith(_MAY_CHANGE):
            yield f"model.{change}, and the base's parameters do not suit it; leave it out"
    if cfg.model.vocab_size < model.vocab_size:
        yield (
            f"model.vocab_size={cfg.model.vocab_size}: the base has {model.vocab_size}; leave it "
            "out"
        )


def first_step(base: BaseModel) -> int:
    """The step of the base's checkpoint."""
    return base.step or Checkpointer(bucket.path_of(base.path) / run_dir.CHECKPOINTS).steps()[-1]


def _optimizer_problems(cfg: Config, base: BaseModel) -> Iterator[str]:
    """Problems of a base whose optimizer state is to be taken."""
    if not cfg.start.optimizer:
        return
    begun, name = base.cfg, f"start.optimizer=True: {base.path}"
    if begun.finetune.task != "none" or run_dir.source_of(base.path) is not None:
        yield f"{name} is no pre-trained run of gptjax, so it has no such state; set it to False"
    elif begun.optim.name != cfg.optim.name:
        yield f"{name} has optim.name={begun.optim.name}, and {cfg.optim.name} is given"
    elif (begun.model.vocab_size, begun.model.table) != (cfg.model.vocab_size, cfg.model.table):
        yield f"{name} has another vocabulary, so its state has other shapes; set it to False"
    if not cfg.start.keep_step:
        return
    step = first_step(base)
    done, others = phases.tokens_at(begun, step), list(_other_batches(begun, cfg, step))
    if others:
        yield (
            f"start.keep_step=True: {base.path} had {others[0]}; give the same train.seq_len, "
            f"train.batch_tokens, growth of the batch and stages as far as step {step}"
        )
    elif cfg.steps <= step:
        yield (
            f"train.tokens={cfg.train.tokens}: {base.path} has been trained on {done} by its step "
            f"{step}, which count with start.keep_step; give more"
        )


def _other_batches(begun: Config, cfg: Config, step: int) -> Iterator[str]:
    """The first batch, of those before a step, that one configuration has and the other has not."""
    ours, theirs = phases.phases(cfg), phases.phases(begun)
    for first in sorted({phase.first for phase in (*ours, *theirs) if phase.first < step}):
        had, has = (phases.phase_at(found, first) for found in (theirs, ours))
        if (had.batch, had.seq_len) != (has.batch, has.seq_len):
            yield (
                f"{had.batch} x {had.seq_len} tokens in step {first + 1}, and this run would have "
                f"{has.batch} x {has.seq_len}"
            )


def _pieces(cfg: Config, base: BaseModel, say: Callable[[str], None]) -> tuple[int, int]:
    """The pieces of the run's tokenizer, and how many of them the base's does not have.

    Raises MismatchError for another tokenizer than the base's, ConfigError where one would be
    trained.
    """
    if cfg.tokenizer.path or cfg.tokenizer.kind == "bytes":
        own = tokenizers.make(cfg.tokenizer, ())
        place = f"tokenizer.path={cfg.tokenizer.path} (kind {own.kind})"
    elif (bucket.path_of(cfg.data.store) / store.MANIFEST).exists():
        own, place = tokenizers.load(bucket.path_of(cfg.data.store)), f"data.store={cfg.data.store}"
    else:
        raise ConfigError(
            [
                f"tokenizer.path='': a new tokenizer would be trained, and {base.path} needs its "
                "own; give its file"
            ]
        )
    known = base.tokenizer
    if known is None:
        say(f"{base.path} has no tokenizer, so nothing shows whether that of {place} is its own")
        return own.vocab_size, 0
    if own.fingerprint == known.fingerprint:
        return own.vocab_size, 0
    if not _extends(own, known):
        raise MismatchError(
            f"{place}: is another tokenizer than that of {base.path}, whose pieces it must keep; "
            "leave it out"
        )
    added = own.vocab_size - known.vocab_size
    say(f"{added} pieces are new to {base.path}: each begins with the mean of the others")
    return own.vocab_size, added


def _extends(own: Tokenizer, known: Tokenizer) -> bool:
    """Whether a tokenizer has all pieces of another under the same ids, and further ones."""
    if own.kind != known.kind or own.vocab_size <= known.vocab_size:
        return False
    return all(own.piece(i) == known.piece(i) for i in range(known.vocab_size))
