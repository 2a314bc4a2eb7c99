"""The configuration: JSON round trip, validation, loading, resuming, no unused field."""

import ast
import dataclasses
import json
import math
import re
import subprocess
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gptjax
from gptjax import config
from gptjax.config import (
    Config,
    DataConfig,
    EvalConfig,
    FinetuneConfig,
    LoraConfig,
    MeshConfig,
    MixturePart,
    ModelConfig,
    OptimConfig,
    StageConfig,
    TokenizerConfig,
    TrainConfig,
    loading,
)
from gptjax.errors import ConfigError, MismatchError

REPO = Path(__file__).resolve().parents[2]
PACKAGE = Path(gptjax.__file__).parent


def problems_of(call) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        call()
    return caught.value.problems


def leaf_types(cls: type = Config, prefix: str = "") -> dict[str, typing.Any]:
    leaves: dict[str, typing.Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            leaves |= leaf_types(hint, f"{prefix}{name}.")
        elif typing.get_origin(hint) is Mapping:
            inner = typing.get_args(hint)[1]
            deeper = dataclasses.is_dataclass(inner)
            leaves |= (
                leaf_types(inner, f"{prefix}{name}.web.")
                if deeper
                else {f"{prefix}{name}.web": inner}
            )
        else:
            leaves[prefix + name] = hint
    return leaves


STAGE = StageConfig(weights={"web": 1.0})
WITH_A_PART = Config(data=DataConfig(mixture={"web": MixturePart()}), stages={"web": STAGE})


def with_leaf(cfg: typing.Any, dotted: str, value: typing.Any) -> typing.Any:
    name, _, rest = dotted.partition(".")
    if isinstance(cfg, dict):
        return cfg | {name: with_leaf(cfg[name], rest, value) if rest else value}
    if rest:
        value = with_leaf(getattr(cfg, name), rest, value)
    return dataclasses.replace(cfg, **{name: value})


def another(value: typing.Any, hint: typing.Any) -> typing.Any:
    """A different value of a field's type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return next(a for a in args if a != value)
    if origin is types.UnionType:
        return another(value, next(a for a in args if a is not types.NoneType))
    if origin is tuple:
        return (*value, another(None, args[0]))
    if hint is bool:
        return not value
    if hint is str:
        return f"{value}x"
    return hint(7) if value is None else value + hint(1)


# --- JSON ------------------------------------------------------------------------------------


def values_of(hint: typing.Any) -> st.SearchStrategy:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return st.builds(hint, **{name: values_of(inner) for name, inner in hints.items()})
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is types.UnionType:
        return st.one_of(*(st.none() if a is types.NoneType else values_of(a) for a in args))
    if origin is tuple:
        return st.lists(values_of(args[0]), max_size=3).map(tuple)
    if origin is Mapping:
        return st.dictionaries(st.text(max_size=5), values_of(args[1]), max_size=2)
    return {
        bool: st.booleans(),
        int: st.integers(),
        float: st.floats(allow_nan=False),
        str: st.text(),
    }[hint]


@settings(max_examples=20, deadline=None)
@given(values_of(Config))
def test_json_round_trips_any_configuration(cfg: Config) -> None:
    through_json = json.loads(json.dumps(config.to_dict(cfg)))
    back = config.from_dict(through_json)
    assert back == cfg
    types_of = {name: type(value) for name, value in config.flatten(back).items()}
    assert types_of == {name: type(value) for name, value in config.flatten(cfg).items()}


def test_absent_fields_take_their_defaults() -> None:
    cfg = config.from_dict({"model": {"layers": 3}})
    assert cfg == Config(model=ModelConfig(layers=3))


def test_integer_is_accepted_for_a_float_field() -> None:
    lr = config.from_dict({"optim": {"lr": 1}}).optim.lr
    assert lr == 1.0
    assert isinstance(lr, float)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"modl": {}}, ["modl", "model"]),
        ({"model": {"layrs": 2}}, ["model.layrs", "model.layers"]),
        ({"optim": {"weight_decy": 0.0}}, ["optim.weight_decy", "optim.weight_decay"]),
        ({"mesh": {"qqq": 0}}, ["mesh.qqq", "data", "fsdp", "tensor"]),
    ],
)
def test_unknown_field_suggests_the_nearest_names(values: dict, wanted: list[str]) -> None:
    (problem,) = problems_of(lambda: config.from_dict(values))
    assert all(part in problem for part in wanted)
    assert "unknown" in problem


@pytest.mark.parametrize(
    ("dotted", "value", "wanted"),
    [
        ("train.seed", True, "int"),
        ("train.seed", 1.5, "int"),
        ("train.seed", "1", "int"),
        ("train.seed", None, "int"),
        ("optim.lr", "1e-3", "float"),
        ("optim.lr", False, "float"),
        ("compute.scan_layers", 1, "bool"),
        ("data.store", 3, "str"),
        ("data.sources", "a.txt", "list"),
        ("data.sources", [1], "str"),
        ("model.kv_heads", "4", "int"),
        ("model.norm", "batchnorm", "layernorm, rmsnorm"),
        ("model.norm", ["layernorm"], "layernorm, rmsnorm"),
        ("model.pattern", ["full", "half"], "full, window"),
        ("model", 3, "object"),
    ],
)
def test_value_of_wrong_type_is_reported_with_the_expected_type(
    dotted: str, value: object, wanted: str
) -> None:
    section, _, name = dotted.partition(".")
    values = {section: {name: value} if name else value}
    (problem,) = problems_of(lambda: config.from_dict(values))
    assert problem.startswith(f"{dotted}={value!r}")
    assert wanted in problem


def test_from_dict_reports_all_problems_at_once() -> None:
    values = {
        "modl": 1,
        "model": {"layrs": 2, "norm": "x", "layers": "two"},
        "optim": {"lr": None},
        "data": 4,
    }
    names = {"modl", "model.layrs", "model.norm", "model.layers", "optim.lr", "data"}
    found = problems_of(lambda: config.from_dict(values))
    assert {p.split("=")[0].split(":")[0] for p in found} == names


# --- validation ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cfg", "wanted"),
    [
        (Config(model=ModelConfig(heads=7)), ["model.heads=7", "768", "6 or 8"]),
        (Config(model=ModelConfig(kv_heads=5)), ["model.kv_heads=5", "12", "4 or 6"]),
        (Config(model=ModelConfig(layers=3, pattern=("full",) * 2)), ["model.layers=3", "2 or 4"]),
        (Config(model=ModelConfig(pattern=("window",))), ["model.window=None"]),
        (Config(model=ModelConfig(pattern=())), ["model.pattern"]),
        (Config(model=ModelConfig(positions="rope", head_dim=7)), ["model.head_dim=7"]),
        (Config(model=ModelConfig(shared_norm=True)), ["model.shared_norm", "model.residual"]),
        (Config(model=ModelConfig(vocab_size=100)), ["model.vocab_size=100", "4096"]),
        (Config(model=ModelConfig(dropout=1.0)), ["model.dropout=1.0"]),
        (Config(train=TrainConfig(seq_len=2048)), ["train.seq_len=2048", "model.context=1024"]),
        (Config(train=TrainConfig(batch_tokens=1500)), ["train.batch_tokens", "1024 or 2048"]),
        (Config(train=TrainConfig(accumulation=3)), ["train.accumulation=3", "512", "2 or 4"]),
        (Config(optim=OptimConfig(lr=math.nan)), ["optim.lr=nan"]),
        (Config(optim=OptimConfig(lr=math.inf)), ["optim.lr=inf", "finite"]),
        (Config(model=ModelConfig(norm_eps=math.inf)), ["model.norm_eps=inf", "finite"]),
        (Config(optim=OptimConfig(eps=0.0)), ["optim.eps=0.0", "above 0"]),
        (Config(optim=OptimConfig(eps=math.nan)), ["optim.eps=nan", "above 0"]),
        (Config(optim=OptimConfig(final_lr_ratio=-0.1)), ["optim.final_lr_ratio=-0.1", "0 to 1"]),
        (Config(optim=OptimConfig(lr_schedule="wsd")), ["optim.decay_tokens=0", "constant"]),
        (
            Config(optim=OptimConfig(lr_schedule="constant", decay_tokens=512)),
            ["optim.decay_tokens=512", "constant", "wsd"],
        ),
        (Config(optim=OptimConfig(decay_tokens=10**12)), ["optim.decay_tokens=1000000000000"]),
        (Config(optim=OptimConfig(decay_shape="1-sqrt")), ["optim.decay_shape=1-sqrt", "cosine"]),
        (Config(optim=OptimConfig(lr_schedule="inverse_sqrt")), ["optim.warmup_tokens=0"]),
        (Config(optim=OptimConfig(lr_schedule="wsd", decay_tokens=10**12)), ["decay_tokens"]),
        (Config(eval=EvalConfig(sample_tokens=1024)), ["eval.sample_tokens", "model.context"]),
        (Config(eval=EvalConfig(sample_tokens=0)), ["eval.sample_tokens=0", "at least 1"]),
        (Config(eval=EvalConfig(tasks=("arc",))), ["eval.tasks=arc", "KIND:FILE"]),
        (Config(eval=EvalConfig(tasks=("mmlu:x",))), ["eval.tasks=mmlu:x", "'mmlu'", "hellaswag"]),
        (Config(eval=EvalConfig(tasks=("arc:x", "arc:x"))), ["eval.tasks=arc:x", "twice"]),
        (Config(eval=EvalConfig(tasks_every=-1)), ["eval.tasks_every=-1"]),
        (Config(eval=EvalConfig(task_limit=-1)), ["eval.task_limit=-1"]),
        (Config(finetune=FinetuneConfig(freeze=("embed",))), ["finetune.freeze=", "finetune`"]),
        (Config(finetune=FinetuneConfig(lora=LoraConfig(rank=4))), ["finetune.lora=", "rank=4"]),
        (Config(data=DataConfig(sources=())), ["data.sources"]),
        (Config(data=DataConfig(valid_fraction=0.0)), ["data.valid_fraction"]),
    ],
)
def test_check_reports_field_value_and_remedy(cfg: Config, wanted: list[str]) -> None:
    (problem,) = problems_of(cfg.check)
    assert all(part in problem for part in wanted), problem


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        (["--optim.learning-rate", "1e-3"], "--optim.lr"),
        (["--train.batch-size=64"], "--train.batch_tokens (in tokens)"),
        (["--max_steps", "100"], "--train.tokens (in tokens)"),
        (["--model.n-layer", "3"], "--model.layers"),
    ],
)
def test_names_of_other_trainers_get_ours(words: list[str], ours: str) -> None:
    (problem,) = problems_of(lambda: config.override(Config(), words, "gptjax train"))
    name = "--" + words[0][2:].partition("=")[0].replace("-", "_")
    assert problem == f"{name}: unknown option; here it is {ours}"
    with pytest.raises(ConfigError, match=re.escape(f"here it is {ours[2:]}")):
        config.from_dict({"optim": {}, name[2:].rpartition(".")[2]: 1})


def test_a_name_below_evaluation_is_not_taken_for_trainings() -> None:
    (problem,) = problems_of(lambda: config.from_dict({"eval": {"batch_size": 4}}))
    assert problem == "eval.batch_size: unknown field; did you mean eval.batch?"


def test_names_of_other_trainers_are_told_for_fields_that_exist() -> None:
    assert set(loading._ELSEWHERE) <= set(config.flatten(Config()))


def test_check_reports_all_problems_at_once() -> None:
    cfg = Config(
        model=ModelConfig(layers=0, heads=7, dropout=-1.0),
        train=TrainConfig(seq_len=2048),
        eval=EvalConfig(batch=12),
    )
    found = problems_of(lambda: cfg.check(devices=8))
    for name in ("model.layers", "model.heads", "model.dropout", "train.seq_len", "eval.batch"):
        assert any(p.startswith(f"{name}=") for p in found), name


@pytest.mark.parametrize("field", ["heads", "kv_heads", "embed"])
def test_zero_dimension_does_not_hide_other_problems(field: str) -> None:
    cfg = Config(model=ModelConfig(**{field: 0}), train=TrainConfig(seq_len=2048))
    found = problems_of(cfg.check)
    assert any(p.startswith(f"model.{field}=0") for p in found)
    assert any(p.startswith("train.seq_len=2048") for p in found)


@pytest.mark.parametrize(
    "train", [TrainConfig(seq_len=0), TrainConfig(accumulation=0), TrainConfig(batch_tokens=0)]
)
def test_check_with_devices_reports_zeros_instead_of_dividing_by_them(train: TrainConfig) -> None:
    found = problems_of(lambda: Config(train=train).check(devices=8))
    assert any("=0: must be at least 1" in p for p in found)


@pytest.mark.parametrize("value", [0, -4])
def test_head_dim_below_one_is_refused(value: int) -> None:
    found = problems_of(Config(model=ModelConfig(head_dim=value)).check)
    assert any(p.startswith(f"model.head_dim={value}") for p in found)


# --- mesh ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "devices", "shape"),
    [
        (MeshConfig(), 8, (8, 1, 1, 1, 1, 1)),
        (MeshConfig(fsdp=4), 8, (2, 1, 4, 1, 1, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), 8, (2, 1, 2, 1, 1, 2)),
        (MeshConfig(data=2, stage=-1), 8, (2, 4, 1, 1, 1, 1)),
        (MeshConfig(data=1, fsdp=1, tensor=1), 1, (1, 1, 1, 1, 1, 1)),
    ],
)
def test_axis_of_minus_one_takes_the_remaining_devices(mesh, devices, shape) -> None:
    assert mesh.shape(devices) == dict(
        zip(("data", "stage", "fsdp", "expert", "context", "tensor"), shape, strict=True)
    )


@pytest.mark.parametrize(
    ("mesh", "wanted"),
    [
        (MeshConfig(fsdp=3), ["mesh.data=-1", "3", "[1, 2, 4, 8]"]),
        (MeshConfig(data=2, fsdp=2), ["data=2", "fsdp=2", "4 devices", "8"]),
        (MeshConfig(fsdp=0), ["mesh.fsdp=0"]),
        (MeshConfig(tensor=0), ["mesh.tensor=0"]),
        (MeshConfig(fsdp=-2), ["mesh.fsdp=-2"]),
        (MeshConfig(data=0), ["data=0"]),
    ],
)
def test_mesh_that_does_not_match_the_device_count_is_refused(mesh, wanted: list[str]) -> None:
    found = "\n".join(problems_of(lambda: Config(mesh=mesh).check(devices=8)))
    assert all(part in found for part in wanted), found


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (
            {"mesh.tensor": 8, "model.kv_heads": 12, "model.heads": 24},
            ["model.kv_heads=12", "tensor=8", "8 or 16", "6 or 12"],
        ),
        (
            {"mesh.tensor": 4, "model.heads": 4, "model.kv_heads": 2},
            ["model.kv_heads=2", "tensor=4", "use 4,", "2"],
        ),
        ({"mesh.tensor": 2, "model.mlp": 3071}, ["model.mlp=3071", "tensor=2", "3070 or 3072"]),
        (
            {"mesh.tensor": 2, "model.vocab_size": 50257, "model.vocab_multiple": 1},
            ["model.vocab_multiple=1", "tensor=2", "use 2"],
        ),
        (
            {"mesh.fsdp": 8, "model.embed": 36, "model.heads": 2},
            ["model.embed=36", "fsdp=8", "32 or 40", "6 or 9"],
        ),
        ({"eval.batch": 12}, ["eval.batch=12", "data x fsdp x expert=8", "8 or 16", "6 or 12"]),
        (
            {"train.batch_tokens": 12 * 1024},
            ["train.batch_tokens=12288", "data x fsdp x expert = 8", "8192 or 16384"],
        ),
        (
            {"train.batch_tokens": 16 * 1024, "train.accumulation": 4},
            ["train.batch_tokens=16384", "data x fsdp x expert = 8", "use 32768"],
        ),
    ],
)
def test_indivisible_dimension_is_reported_with_axis_and_nearest_legal_values(
    changes: dict, wanted: list[str]
) -> None:
    cfg = Config()
    for name, value in changes.items():
        cfg = with_leaf(cfg, name, value)
    cfg.check()
    (problem,) = problems_of(lambda: cfg.check(devices=8))
    assert all(part in problem for part in wanted), problem


def test_processes_that_would_share_a_sequence_are_refused() -> None:
    cfg = Config(mesh=MeshConfig(data=4, tensor=2), eval=EvalConfig(batch=12))
    cfg.check(devices=8, processes=2)
    assert "3 processes" in problems_of(lambda: cfg.check(devices=8, processes=3))[0]


# --- loading ---------------------------------------------------------------------------------

PRESET = """
from gptjax.config import Config, TrainConfig
def main():
    return Config(train=TrainConfig(seed=1))
def medium():
    return Config(train=TrainConfig(seed=2))
def _hidden():
    return 3
"""


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.py"
    file.write_text(PRESET)
    return file


def test_preset_is_a_function_of_a_file_with_main_as_the_default(preset: Path) -> None:
    assert config.load(str(preset)).train.seed == 1
    assert config.load(f"{preset}:medium").train.seed == 2
    assert not list(preset.parent.glob("__pycache__"))


def test_json_file_and_run_folder_are_configurations(tmp_path: Path) -> None:
    cfg = Config(train=TrainConfig(seed=3))
    file = tmp_path / config.CONFIG_FILE
    file.write_text(json.dumps(config.to_dict(cfg)))
    assert config.load(str(file)) == cfg
    assert config.load(str(tmp_path)) == dataclasses.replace(
        cfg, run=str(tmp_path)
    )  # wherever it was moved


@pytest.mark.parametrize(
    ("argument", "wanted"),
    [
        ("recipe.py:medum", ["recipe.py", "medum", "medium"]),
        ("recipe.py:zzz", ["zzz", "main", "medium"]),
        ("recipe.py:_hidden", ["_hidden", "no such preset"]),
        ("recpe.py", ["recpe.py: no such file", "recipe.py"]),
        ("nothing/like/it.py", ["nothing/like/it.py: no such file"]),
        ("empty", ["empty", "config.json", "not a run"]),
        ("notes.txt", ["notes.txt", ".py", ".json", "run folder"]),
        ("damaged.json", ["damaged.json", "JSON"]),
        ("list.json", ["list.json", "object"]),
    ],
)
def test_unloadable_argument_is_reported(
    preset: Path, monkeypatch: pytest.MonkeyPatch, argument: str, wanted: list[str]
) -> None:
    monkeypatch.chdir(preset.parent)
    Path("empty").mkdir()
    Path("notes.txt").write_text("x")
    Path("damaged.json").write_text('{"model": ')
    Path("list.json").write_text("[]")
    (problem,) = problems_of(lambda: config.load(argument))
    assert all(part in problem for part in wanted), problem
    assert "_hidden" not in problem.replace(argument, "")


def test_provenance_is_default_preset_or_command_line(preset: Path) -> None:
    overrides = ["--model.layers", "3", "--optim.weight-decay=0.2", "--data.sources", "a", "b"]
    cfg = config.resolve(str(preset), overrides, "gptjax config")
    origins = config.provenance(cfg, str(preset), overrides)
    assert set(origins) == set(config.flatten(Config()))
    given = {"model.layers", "optim.weight_decay", "data.sources"}
    assert {name for name, origin in origins.items() if origin == "command line"} == given
    assert {name for name, origin in origins.items() if origin == str(preset)} == {"train.seed"}
    assert set(origins.values()) == {"default", str(preset), "command line"}
    assert (cfg.model.layers, cfg.optim.weight_decay) == (3, 0.2)
    assert cfg.data.sources == ("a", "b")


def preset_arguments() -> list[str]:
    found = []
    for file in sorted((REPO / "configs").glob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                found.append(f"configs/{file.name}:{node.name}")
    return found


@pytest.mark.parametrize("argument", preset_arguments())
def test_every_preset_passes_its_check(argument: str) -> None:
    cfg = config.load(str(REPO / argument))
    assert isinstance(cfg, Config)
    cfg.check()


# --- resuming --------------------------------------------------------------------------------


def test_every_field_has_a_resume_class() -> None:
    classes = config.resume_classes()
    named = {name.replace("*", "web") for name in classes}
    assert named == set(config.flatten(WITH_A_PART)) == set(leaf_types())
    assert set(classes.values()) == {"identity", "schedule", "stage", "free"}


@pytest.mark.parametrize("dotted", leaf_types())
def test_changed_field_is_refused_or_reported_by_its_resume_class(dotted: str) -> None:
    saved = WITH_A_PART
    value = config.flatten(saved)[dotted]
    new = another(value, leaf_types()[dotted])
    given = with_leaf(saved, dotted, new)
    kind = config.resume_classes()[re.sub(r"\.web\b", ".*", dotted)]
    if kind == "identity":
        with pytest.raises(MismatchError) as caught:
            config.resume_changes(saved, given)
        (line,) = caught.value.differences
    elif dotted == "run":
        assert config.resume_changes(saved, given) == []
        return
    else:
        (line,) = config.resume_changes(saved, given)
        assert kind in line
    assert line.startswith(f"{dotted}: ")
    assert line.index(repr(value)) < line.rindex(repr(new))


def test_resume_lists_all_refused_changes_at_once() -> None:
    given = Config(
        model=ModelConfig(layers=2, embed=24),
        train=TrainConfig(seed=5),
        optim=OptimConfig(lr=1.0),
    )
    with pytest.raises(MismatchError) as caught:
        config.resume_changes(Config(), given)
    names = {line.split(":")[0] for line in caught.value.differences}
    assert names == {"model.layers", "model.embed", "train.seed"}
    assert all(line in str(caught.value) for line in caught.value.differences)


def test_a_part_that_is_added_or_left_out_is_another_run() -> None:
    for saved, other in ((Config(), WITH_A_PART), (WITH_A_PART, Config())):
        with pytest.raises(MismatchError) as caught:
            config.resume_changes(saved, other)
        assert any("data.mixture.web.weight" in line for line in caught.value.differences)


def test_resume_with_equal_values_has_no_changes() -> None:
    assert config.resume_changes(Config(), Config(run="elsewhere")) == []


@pytest.mark.parametrize(
    "dotted",
    ["model.layers", "model.vocab_size", "train.seed", "train.batch_tokens", "data.sources"],
)
def test_fields_that_define_a_run_are_identity(dotted: str) -> None:
    assert config.resume_classes()[dotted] == "identity"


@pytest.mark.parametrize("section", ["mesh", "log", "eval", "checkpoint"])
def test_placement_and_period_fields_are_free(section: str) -> None:
    classes = config.resume_classes()
    assert {kind for name, kind in classes.items() if name.startswith(f"{section}.")} == {"free"}


# --- no unused field -------------------------------------------------------------------------


def sections(cls: type) -> dict[str, type]:
    """Sections by name, nested ones included."""
    hints = typing.get_type_hints(cls)
    found = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    return found | {name: hint for c in found.values() for name, hint in sections(c).items()}


class _Reads(ast.NodeVisitor):
    """Collects the attributes of configuration classes that a file reads.

    Infers an expression's class from `.section` of a known one, from annotations of arguments and
    class attributes, and from assignments of such expressions to names.
    """

    def __init__(self, root: type) -> None:
        self.by_section = sections(root)
        self.by_class = {cls.__name__: cls for cls in (root, *self.by_section.values())}
        self.names: list[dict[str, type]] = [{}]
        self.attributes: dict[str, type] = {}
        self.reads: set[tuple[type, str]] = set()

    def annotated(self, annotation: ast.AST | None) -> type | None:
        names = (
            [n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)] if annotation else []
        )
        names += (
            [n.attr for n in ast.walk(annotation) if isinstance(n, ast.Attribute)]
            if (annotation)
            else []
        )
        return next((self.by_class[n] for n in names if n in self.by_class), None)

    def class_of(self, node: ast.AST) -> type | None:
        if isinstance(node, ast.Name):
            return next((scope[node.id] for scope in self.names[::-1] if node.id in scope), None)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return self.attributes.get(node.attr)
            owner = self.class_of(node.value)
            return self.by_section.get(node.attr) if owner else None
        return None

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before = self.attributes
        self.attributes = {
            item.target.id: cls
            for item in node.body
            if isinstance(item, ast.AnnAssign)
            and isinstance(item.target, ast.Name)
            and (cls := self.annotated(item.annotation))
        }
        for item in ast.walk(node):  # self._cfg = cfg in a method whose argument is annotated
            if isinstance(item, ast.FunctionDef):
                arguments = {a.arg: self.annotated(a.annotation) for a in item.args.args}
                for assign in ast.walk(item):
                    if isinstance(assign, ast.Assign):
                        self._self_assignments(assign, arguments)
        self.generic_visit(node)
        self.attributes = before

    def _self_assignments(self, node: ast.Assign, arguments: Mapping[str, type | None]) -> None:
        for target, value in _pairs(node):
            is_attribute = isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name)
            if is_attribute and target.value.id == "self" and isinstance(value, ast.Name):
                cls = arguments.get(value.id)
                if cls is not None:
                    self.attributes[target.attr] = cls

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.Lambda) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        self.names.append({a.arg: self.annotated(a.annotation) for a in arguments})
        self.generic_visit(node)
        self.names.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Assign(self, node: ast.Assign) -> None:
        for target, value in _pairs(node):
            if isinstance(target, ast.Name) and (cls := self.class_of(value)):
                self.names[-1][target.id] = cls
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if isinstance(node.target, ast.Name) and (cls := self.annotated(node.annotation)):
            self.names[-1][node.target.id] = cls
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self.class_of(node.value)
        if owner is not None and isinstance(node.ctx, ast.Load):
            self.reads.add((owner, node.attr))
        self.generic_visit(node)


def _pairs(node: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from zip(target.elts, node.value.elts, strict=False)
        else:
            yield target, node.value


def unread_leaves(root: type, definitions: str, files: Mapping[str, str]) -> set[str]:
    """Dotted names of fields that no file reads.

    `definitions` is the source of the dataclasses: reading a method or property there counts as
    reading the fields that it uses.
    """
    scan = _Reads(root)
    for text in files.values():
        scan.names, scan.attributes = [{}], {}
        scan.visit(ast.parse(text))
    for node in ast.parse(definitions).body:
        cls = scan.by_class.get(getattr(node, "name", ""))
        methods = [m for m in getattr(node, "body", ()) if isinstance(m, ast.FunctionDef)]
        for method in methods if cls else ():
            if (cls, method.name) in scan.reads:
                for inner in ast.walk(method):
                    if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Name):
                        scan.reads |= {(cls, inner.attr)} if inner.value.id == "self" else set()
                scan.attributes = sections(cls)  # self.section.leaf
                scan.visit(method)
    leaves: dict[tuple[type, str], str] = {}

    def collect(cls: type, prefix: str) -> None:
        for name, hint in typing.get_type_hints(cls).items():
            if dataclasses.is_dataclass(hint):
                collect(hint, f"{prefix}{name}.")
            else:
                leaves[cls, name] = prefix + name

    collect(root, "")
    return {dotted for read, dotted in leaves.items() if read not in scan.reads}


def test_every_configuration_field_is_read_somewhere() -> None:
    files = {
        str(path): path.read_text().replace("cfg: Any", "cfg: Config")
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent.name != "config" or path.name == "phases.py"
    }
    schema = [PACKAGE / "config" / f"{name}.py" for name in ("model", "mesh", "schema")]
    definitions = "\n".join(file.read_text() for file in schema)
    assert unread_leaves(Config, definitions, files) == set()


DEFINITIONS = """
class Config:
    def check(self):
        return self.run
class One:
    @property
    def doubled(self):
        return 2 * self.halves
"""


@pytest.mark.parametrize(
    ("source", "unread"),
    [
        ("def f(cfg: Config):\n    return cfg.one.name, cfg.one.halves, cfg.two.name", {"run"}),
        ("def f(one: One): return one.name\ndef g(cfg: Config): return cfg.two.name, cfg.run",
         {"one.halves"}),
        ("def f(cfg: Config):\n    o, t = cfg.one, cfg.two\n    return o.doubled, t.name, cfg.run",
         {"one.name"}),
        ("class A:\n    def __init__(self, cfg: One): self._c = cfg\n"
         "    def f(self): return self._c.halves, self._c.name",
         {"run", "two.name"}),
        ("def f(other):\n    return other.name, other.halves, other.run",
         {"run", "one.name", "one.halves", "two.name"}),
        ("def f(cfg: Config):\n    cfg.check()\n    return cfg.one.name, cfg.one.halves",
         {"two.name"}),
    ],
)  # fmt: skip
def test_scan_finds_a_field_that_nothing_reads(source: str, unread: set[str]) -> None:
    one = dataclasses.make_dataclass("One", [("halves", int), ("name", str)])
    two = dataclasses.make_dataclass("Two", [("name", str)])
    root = dataclasses.make_dataclass("Config", [("run", str), ("one", one), ("two", two)])
    assert unread_leaves(root, DEFINITIONS, {"f.py": source}) == unread


# --- cheap to import -------------------------------------------------------------------------


def test_importing_config_loads_neither_jax_nor_tensorflow() -> None:
    code = "import sys, gptjax.config; print(*sorted(m.partition('.')[0] for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "gptjax" in loaded
    assert loaded.isdisjoint({"jax", "jaxlib", "flax", "optax", "tensorflow", "numpy"})


def test_tokenizer_vocab_size_is_not_checked_when_the_tokenizer_is_loaded() -> None:
    cfg = Config(model=ModelConfig(vocab_size=512), tokenizer=TokenizerConfig(path="some.model"))
    cfg.check()
