"""What is told of runs: by `gptjax inspect`, `gptjax report` and its page."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from browser import CHROMIUM, Browser

import gptjax
from gptjax import config
from gptjax.config import Config, LogConfig, ModelConfig, MoeConfig, TrainConfig
from gptjax.model import decoder
from gptjax.model.flops import ModelCost
from gptjax.parallel import mesh
from gptjax.param_tree import leaves_by_path
from gptjax.report import page, run_files
from gptjax.report.run_files import RunFiles


def shapes_of(model: ModelConfig) -> dict[str, list]:
    """Shapes and types by path, as a checkpoint's metadata have them."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh()):
        shapes = jax.eval_shape(lambda: decoder.init(model, jax.random.key(0)))
    return {f"params/{path}": [x.shape, str(x.dtype)] for path, x in leaves_by_path(shapes).items()}


HOSTILE = "</script><script>document.title = 'taken'</script> & <b>bold</b>"


def write_run(folder: Path, lr: float = 1e-3) -> str:
    """A run as training leaves it, killed once after step 7 of 10; its checkpoints hold nothing."""
    cfg = Config(
        run=str(folder),
        model=ModelConfig(vocab_size=258, context=32, layers=2, embed=32, heads=4),
        train=TrainConfig(tokens=5120, batch_tokens=512, seq_len=32),
        log=LogConfig(peak_tflops=1.0),
    )
    cfg = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, lr=lr))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict(cfg)))
    rows = [
        {
            "step": n,
            "time": 1000.0 + 10 * n,
            "loss": 5 - n * lr,
            "lr": lr,
            "nonfinite": float(n == 3),
        }
        for n in range(1, 11)
    ]
    rows[2]["loss"] = float("nan")
    rows.insert(5, {"step": 5, "time": 1050.0, "valid_loss": 4.5, "valid_bits_per_byte": 2.0})
    rows.append({"step": 10, "time": 1101.0, "valid_loss": 4.25, "valid_bits_per_byte": 1.75})
    lines = [*map(json.dumps, rows), '{"step": 11, "lo']
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    sessions = [
        {
            "began": 990.0,
            "now": 1070.0,
            "first": 0,
            "step": 7,
            "seconds": {"step": 70, "compile": 10},
        },
        {
            "began": 1080.0,
            "now": 1110.0,
            "first": 5,
            "step": 10,
            "seconds": {"step": 25, "eval": 5},
        },
    ]
    (folder / "sessions.jsonl").write_text("\n".join(map(json.dumps, sessions)))
    rewind = {"step": 8, "why": "loss 9 is 12.0 deviations above 4", "to": 5}
    left_out = [{"first": 7, "last": 8, "rewind": rewind}, {"first": 2, "last": 2, "rewind": None}]
    (folder / "left_out.json").write_text(json.dumps(left_out))
    (folder / "samples").mkdir()
    for step in (5, 10):
        (folder / "samples" / f"{step}.txt").write_text(f"--- prompt ''\n{HOSTILE}\n")
    tree = shapes_of(cfg.model)
    for step in (5, 10):
        (folder / "checkpoints" / str(step) / "meta").mkdir(parents=True)
        (folder / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").touch()
        meta = json.dumps({"tree": tree})
        (folder / "checkpoints" / str(step) / "meta" / "data.json").write_text(meta)
    (folder / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir()
    return str(folder)


def test_a_damaged_checkpoint_does_not_keep_a_run_from_being_shown(
    tmp_path: Path, command_line
) -> None:
    run = write_run(tmp_path / "run")
    for text in ('{"no": "tree"}', "{", ""):
        (tmp_path / "run/checkpoints/10/meta/data.json").write_text(text)
        assert RunFiles.open(run).parameters() is None
        code, out, _ = command_line("inspect", run)
        assert code == 0
        assert "parameters" in out  # as the model has them


def shown(text: str) -> dict:
    """What a page shows."""
    (data,) = (line for line in text.splitlines() if 'type="application/json"' in line)
    return json.loads(data.partition(">")[2].rpartition("</script>")[0].replace("<\\/", "</"))


def test_inspect_says_how_far_a_run_is_from_its_files_alone(tmp_path: Path, command_line) -> None:
    run = write_run(tmp_path / "run")
    code, out, err = command_line("inspect", run)
    assert (code, err) == (0, "")
    total = ModelCost(config.load(run).model).parameters.total
    assert f"{run}: {total:,} parameters, {total:,} active" in out
    assert "step 10 of 10, 5,120 tokens" in out
    assert "loss 4.9900 (step 10), valid_loss 4.2500 (step 10)" in out
    assert "120 s in 2 sessions, goodput 62.5%" in out  # 70 of 95 s: two of seven steps were lost
    assert "checkpoints: 5, 10\n" in out
    assert "size: 0.0 MB" in out


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(vocab_size=300, layers=2, embed=32, heads=4),
        ModelConfig(vocab_size=300, layers=2, embed=32, heads=4, tied_embeddings=False),
        ModelConfig(
            vocab_size=300,
            layers=2,
            embed=32,
            heads=4,
            activation="swiglu",
            moe=MoeConfig(experts=4, top_k=2, shared=1),
        ),
    ],
)
def test_parameters_are_counted_by_shapes_as_the_model_counts_them(model: ModelConfig) -> None:
    parameters = ModelCost(model).parameters
    assert run_files.count(shapes_of(model), model) == (parameters.total, parameters.active)


def test_the_page_of_several_runs_has_all_that_was_recorded(tmp_path: Path, command_line) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", lr=2e-3)
    file = tmp_path / "report.html"
    code, out, err = command_line("report", one, two, "--html", file)
    assert (code, err) == (0, "")
    assert f"{file}: written" in out
    text = file.read_text()
    data = shown(text)
    assert text.count("</script>") == 2  # what a sample contains ends neither
    first, second = data["runs"]
    assert (first["name"], second["name"]) == ("one", "two")
    curve = first["curves"]["loss"]
    assert curve["step"] == list(range(1, 11))
    assert curve["tokens"] == [512 * n for n in range(1, 11)]
    assert curve["hours"][0] == pytest.approx(20 / 3600)
    assert curve["value"][2] is None
    assert curve["training"]
    assert first["curves"]["valid_loss"]["value"] == [4.5, 4.25]
    assert first["evaluations"]["valid_bits_per_byte"] == [10, 1.75]
    assert first["samples"]["10"].splitlines()[1] == HOSTILE
    assert first["events"][1].endswith(
        "resumed after step 5; steps 6 to 7 were lost; trained to step 10"
    )
    assert first["events"][2:] == [
        "loss 9 is 12.0 deviations above 4 at step 8: back to step 5; steps 7 to 8 are left out",
        "steps 2 to 2 are left out",
        "loss or gradient not finite at step 3",
    ]
    assert data["differences"] == [["optim.lr", "0.001", "0.002"]]
    assert "train.tokens = 5120" in first["configuration"]
    for words, told in {
        (one, one): "one of them is given twice",
        (str(tmp_path / "none"),): "none: is no run folder; it has no config.json",
        ("debug",): "debug: is no run folder",  # a preset is none
        (one, "--html", str(tmp_path / "no" / "x.html")): "cannot be written: No such file",
    }.items():
        code, _, err = command_line("report", *words)
        assert code in (2, 73)
        assert told in err


def test_rows_of_a_step_are_read_as_one(tmp_path: Path) -> None:
    rows = gptjax.read_metrics(write_run(tmp_path / "run"))
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert (rows[4]["loss"], rows[4]["valid_loss"]) == (pytest.approx(4.995), 4.5)
    assert (rows[9]["time"], rows[9]["valid_loss"]) == (1100.0, 4.25)
    assert "valid_loss" not in rows[5]


def test_long_curves_are_thinned_and_keep_their_end(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    rows = ({"step": n, "loss": 1 / n} for n in range(1, 10001))
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    curve = page._curves(RunFiles.open(run))["loss"]
    assert 1000 < len(curve["step"]) < 2000
    assert curve["step"][-1] == 10000


@pytest.fixture
def phone(tmp_path: Path) -> Iterator[Browser]:
    opened = Browser(tmp_path / "profile", width=390, height=800)
    yield opened
    opened.close()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_is_drawn_on_a_phone_and_in_the_dark(phone: Browser, tmp_path: Path) -> None:
    runs = [RunFiles.open(write_run(tmp_path / name)) for name in ("one", "two")]
    for number in (1, 2):
        (tmp_path / "page.html").write_text(page.render(runs[:number]))
        for scheme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            phone.call("Emulation.setEmulatedMedia", features=features)
            phone.open(f"file://{tmp_path}/page.html")
            assert phone.run("document.title") == ("one", "one, two")[number - 1]
            assert phone.run("document.querySelectorAll('figure').length") == 3
            ground = phone.run("getComputedStyle(document.body).backgroundColor")
            assert ground == ("rgb(250, 250, 248)" if scheme == "light" else "rgb(23, 24, 27)")
            wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert phone.run(wide) == 0
            before = phone.run("document.querySelector('path').getAttribute('d')")
            phone.run("document.getElementById('log').click()")
            assert phone.run("document.querySelector('path').getAttribute('d')") != before
            assert phone.run("document.querySelector('pre').textContent").endswith(HOSTILE + "\n")
    assert phone.problems == []
