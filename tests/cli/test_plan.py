"""`gptjax plan`: its output and page, one line for each mistake, and its imports."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gptjax.plan import aot, gpu_compiler

REPO = Path(__file__).resolve().parents[2]
SMALL = str(REPO / "configs" / "gpt2.py:small")
FITS = ("--machine", "v5e:4x4", "--mesh.fsdp", "16")
TOO_MUCH = ("--machine", "v5e:2x2", "--mesh.data", "4", "--compute.remat", "none")


@pytest.fixture
def run(command_line, monkeypatch):
    """Runs `gptjax plan` in this process: exit code, standard output, standard error."""
    for name in (
        "JAX_PLATFORMS",
        "TPU_SKIP_MDS_QUERY",
        "ALLOW_MULTIPLE_LIBTPU_LOAD",
        "TPU_WORKER_HOSTNAMES",
        "TPU_ACCELERATOR_TYPE",
    ):  # that the command sets, put back as they were
        monkeypatch.setenv(name, os.environ.get(name, ""))
    return lambda *argv: command_line("plan", *argv)


def sentence(err):
    """The only line on standard error."""
    (line,) = err.strip().splitlines()
    assert line.startswith("gptjax: ")
    return line


def number_after(word, out):
    """The first number of the line that begins with a word."""
    (line,) = [line for line in out.splitlines() if line.startswith(word)]
    return float(re.search(r"[\d,.]*\d", line.removeprefix(word))[0].replace(",", ""))


# --- output --------------------------------------------------------------------------------------


def test_plan_prints_memory_step_and_budget_as_predictions(run) -> None:
    code, out, err = run(SMALL, *FITS, "--price", "2.5")
    assert (code, err) == (0, "")
    assert "predicted" in out
    assert "nothing was measured" in out
    for part in ("v5e:4x4", "16 devices TPU v5 lite", "fsdp 16", "remat dots", "reduce-scatter"):
        assert part in out
    lines = {line.split()[0]: line for line in out.splitlines() if line and line[0] != " "}
    assert re.search(r"\d of 15\.75 GiB a device: fits", lines["memory"])
    assert "524,288 tokens" in lines["step"]
    assert "10,000,000,000 tokens" in lines["budget"]
    hours = re.search(r"([\d,]+) chip-hours, ([\d,]+) at 2\.5 a chip-hour", lines["budget"])
    spent, price = (int(figure.replace(",", "")) for figure in hours.groups())
    assert price == pytest.approx(2.5 * spent, abs=2)
    assert "blocks/layer_0/attn/q" in out  # each tensor, and a device's part of it
    assert re.search(r"^embed +50304x768 +50304x48 ", out, re.MULTILINE)


def test_checkpoints_have_a_size_a_time_and_an_interval(run) -> None:
    _, out, _ = run(SMALL, *FITS)
    assert re.search(r"^checkpoint 1\.49 GB, 0\.37 from each process$", out, re.M)
    assert "--checkpoint.every" not in out
    _, out, _ = run(SMALL, *FITS, "--storage", "0.1", "--failures", "12")
    assert re.search(
        r"^checkpoint 1\.49 GB, 0\.37 from each process, 14\.9 seconds to write$", out, re.M
    )
    every, minutes, lost = re.search(
        r"--checkpoint.every (\d+) \(([\d.]+) minutes\) loses the least time, ([\d.]+)%", out
    ).groups()
    assert float(minutes) == pytest.approx((2 * 14.9 * 7200) ** 0.5 / 60, rel=0.05)
    assert float(lost) == pytest.approx(6.5, abs=0.3)
    assert int(every) > 1000
    code, _, err = run(SMALL, *FITS, "--failures", "2")
    assert code == 2
    assert "--failures=2: requires --storage" in sentence(err)


def test_no_cost_without_price(run) -> None:
    _, out, _ = run(SMALL, *FITS)
    assert "chip-hours" in out
    assert "a chip-hour" not in out.replace("chip-hours", "")


def test_default_mesh_is_fsdp_over_all_devices_and_data_over_slices(run) -> None:
    for name, data, fsdp in (("v5e:4x4", 1, 16), ("2xv5e:4x4", 2, 16), ("h100:16", 1, 16)):
        _, out, _ = run(SMALL, "--machine", name, "--json")
        mesh = json.loads(out)["mesh"]
        assert mesh["data"] == data
        assert mesh["fsdp"] * mesh["fsdp_2"] * mesh["fsdp_3"] == fsdp


def test_machine_defaults_to_the_configured_one(run) -> None:
    code, out, _ = run(SMALL, "--mesh.machine", "h100:16", "--json")
    assert code == 0
    assert json.loads(out)["machine"] == "h100:16"
    _, out, _ = run(SMALL, "--mesh.machine", "h100:16", "--machine", "v5e:4x4", "--json")
    assert json.loads(out)["machine"] == "v5e:4x4"


STAGED = (
    *(SMALL, *FITS, "--model.context", "8192", "--stages.main.tokens", "9000000000"),
    *("--stages.long.seq-len", "8192", "--stages.long.batch-tokens", "1048576"),
)


def test_each_stage_is_planned_and_what_does_not_fit_is_named(run) -> None:
    code, out, err = run(*STAGED)
    assert (code, err) == (0, "")
    main, long = out.split("--- stage ")[1:]
    assert main.startswith("main\n")
    assert "524,288 tokens" in main
    assert "9,000,452,096 tokens" in main  # with the whole of its last batch
    assert "1,048,576 tokens" in long
    assert re.search(r"^stage main: .* of 15.8 GiB, fits; .* tokens/s, ", long, re.M)
    assert re.search(r"^stage long: .* of 15.8 GiB, fits; ", long, re.M)
    assert re.search(r"^all stages: [\d.]+ minutes", long, re.M)
    longer = ("--model.context", "131072", "--stages.long.seq-len", "131072")
    _, out, _ = run(*STAGED, *longer, "--stages.long.batch-tokens", "2097152")
    assert re.search(r"^stage main: .*, fits;", out, re.M)
    assert re.search(r"^stage long: .* does not fit, [\d.]+ GiB too much;", out, re.M)


def test_stages_have_a_page_and_a_json_object_each(run, tmp_path) -> None:
    page = tmp_path / "plan.html"
    code, out, _ = run(*STAGED, "--json", "--html", str(page))
    assert code == 0
    plans = [json.loads(line) for line in out.splitlines()]
    assert [plan["stage"] for plan in plans] == ["main", "long"]
    assert (tmp_path / "plan-main.html").exists()
    assert (tmp_path / "plan-long.html").exists()


def test_a_stage_that_the_mesh_does_not_divide_is_named(run) -> None:
    code, _, err = run(*STAGED, "--stages.long.batch-tokens", "65536")
    assert code == 2
    assert "stages.long.batch_tokens=65536: a batch of 8 sequences is not divisible" in err


def test_json_has_the_printed_figures(run) -> None:
    code, out, err = run(SMALL, *FITS, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["prediction"] is True
    assert found["fits"] is True
    assert (found["machine"], found["devices"]) == ("v5e:4x4", 16)
    assert (found["mesh"]["fsdp"], found["mesh"]["fsdp_2"]) == (4, 4)  # two lines of the torus
    assert sum(found["memory_bytes"].values()) == pytest.approx(found["memory_total_bytes"])
    assert found["memory_total_bytes"] <= found["memory_limit_bytes"] == 15.75 * 2**30
    assert found["step_seconds"] >= found["step_seconds_at_least"] > 0
    assert found["bottleneck"] in ("arithmetic", "memory", "links")
    assert found["tokens_per_second"] == pytest.approx(524_288 / found["step_seconds"])
    assert 0 < found["mfu"] < 1
    assert {"kind", "axes", "count", "wire_bytes"} == set(found["collectives"][0])
    assert "compiled" not in found
    assert "front" not in found
    _, printed, _ = run(SMALL, *FITS)
    memory = number_after("memory", printed)
    assert memory == pytest.approx(found["memory_total_bytes"] / 2**30, abs=0.006)


def test_plan_that_does_not_fit_lists_ways_to_fit(run) -> None:
    code, out, _ = run(SMALL, *TOO_MUCH)
    assert code == 0
    assert "does not fit" in out
    ways = out[out.index("cheapest ways to fit: ") :].splitlines()[0]
    assert "--compute.remat block" in ways
    assert json.loads(run(SMALL, *TOO_MUCH, "--json")[1])["fits"] is False


def test_search_prints_overrides_and_plans_the_fastest(run) -> None:
    code, out, _ = run(SMALL, "--machine", "v5e:2x2", "--search")
    assert code == 0
    lines = out[out.index("fastest first") :].splitlines()[1:]
    assert len(lines) > 1
    for line in lines:
        assert re.search(r"--mesh\.data \d+ .*--compute\.remat \w+ --train\.accumulation \d+", line)
    front = json.loads(run(SMALL, "--machine", "v5e:2x2", "--search", "--json")[1])
    assert len(front["front"]) == len(lines)
    assert front["front"][0]["step_seconds"] == front["step_seconds"]
    pasted = " ".join(front["front"][0]["overrides"]).split()
    again = json.loads(run(SMALL, "--machine", "v5e:2x2", *pasted, "--json")[1])
    assert again["step_seconds"] == front["step_seconds"]
    assert again["memory_total_bytes"] == front["memory_total_bytes"]


# --- the page ------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [FITS, TOO_MUCH, ("--machine", "v5e:2x2", "--search")])
def test_html_page_is_self_contained_and_says_that_it_predicts(run, tmp_path, words) -> None:
    file = tmp_path / "plan.html"
    code, _, err = run(SMALL, *words, "--html", file, "--price", "3")
    assert (code, err) == (0, "")
    text = file.read_text()
    assert "prediction; nothing was measured" in text
    for outside in ("http://", "https://", "src=", "href=", "url(", "@import", "<script"):
        assert outside not in text
    assert text.startswith("<!doctype html>")
    for tag in ("svg", "table", "tr", "td", "g", "p", "h2", "div"):  # every one is closed
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag
    assert not re.search(r"\b(nan|inf)\b", text)
    assert "blocks/layer_0/mlp/up" in text
    assert ("Does not fit" in text) == (words == TOO_MUCH)
    assert ("Pareto front of the search" in text) == ("--search" in words)


def test_html_page_escapes_names(run, tmp_path) -> None:
    file = tmp_path / "plan.html"
    run(SMALL, *FITS, "--html", file, "--run", "runs/<script>&")
    assert "runs/&lt;script&gt;&amp;" in file.read_text()
    assert "<script" not in file.read_text()


def test_html_page_is_written_with_json_too(run, tmp_path) -> None:
    file = tmp_path / "plan.html"
    _, out, _ = run(SMALL, *FITS, "--html", file, "--json")
    assert json.loads(out)["prediction"] is True
    assert file.exists()


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ((), ("--machine: ", "v5e:16x16", "2xv5p:8x8x8", "h100:64")),
        (("--machine", "v5e"), ("--machine=v5e: ", "v5p:8x8x8", "h100:64")),
        (("--machine", "v9:4x4"), ("--machine=v9:4x4: ", "unknown device v9", "v5e")),
        (("--mesh.machine", "v5e:4"), ("--machine=v5e:4: ", "2 dimensions")),
        ((*FITS, "--price", "-1"), ("--price=-1: ", "negative")),
        (("--machine", "v5e:4x4", "--mesh.fsdp", "5"), ("mesh.data=-1", "16")),
        (
            ("--machine", "v5e:4x4", "--mesh.data", "2", "--mesh.fsdp", "4"),
            ("data=2 x stage=1 x fsdp=4", "8 devices", "16"),
        ),
        (("--machine", "2xv5e:4x4", "--mesh.data", "1", "--mesh.fsdp", "32"), ("mesh.data=1: ",)),
        (("--machine", "v5e:1x1", "--search", "--model.layers", "400"), ("--search: ", "devices")),
    ],
)
def test_invalid_options_fail_in_one_line(run, words, wanted) -> None:
    code, out, err = run(SMALL, *words)
    assert (code, out) == (2, "")
    for part in wanted:
        assert part in sentence(err)


def test_compile_without_the_compiler_for_gpus_says_what_to_install(run, monkeypatch) -> None:
    monkeypatch.setattr(gpu_compiler, "_plugin", lambda: None)
    code, _, err = run(SMALL, "--machine", "h100:8", "--compile")
    assert code == 2
    assert "pip install 'gptjax[gpu-plan]'" in sentence(err)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (
            ("--machine", "h100:8", "--compute.dtype", "float32"),
            "cudnn needs compute.dtype=bfloat16",
        ),
        (("--machine", "v5e:4x4", "--compute.attention", "cudnn"), "needs a gpu"),
        (("--machine", "v5e:4x4", "--compute.attention", "reference"), "planned for; choose auto"),
        (("--machine", "v5e:4x4", "--model.dropout", "0.1"), "dropout"),
    ],
)
def test_attention_without_kernel_on_the_machine_is_refused(run, words, why) -> None:
    code, _, err = run(SMALL, *words)
    assert code == 2
    assert "compute.attention=" in sentence(err)
    assert why in sentence(err)


def test_all_indivisible_sizes_are_told_at_once(run) -> None:
    words = ("--machine", "v5e:4x4", "--mesh.data", "1", "--mesh.fsdp", "1", "--mesh.tensor", "16")
    code, out, err = run(SMALL, *words, "--train.batch-tokens", "3072", "--train.accumulation", "3")
    assert (code, out) == (2, "")
    lines = [line.strip() for line in err.splitlines()]
    for name in ("model.heads=12: ", "model.kv_heads=12: "):
        (line,) = [line for line in lines if line.startswith(name)]
        assert "tensor=16" in line
        assert "use 16" in line
    words = ("--machine", "v5e:4x4", "--mesh.data", "1", "--mesh.fsdp", "2", "--mesh.tensor", "8")
    _, _, err = run(SMALL, *words, "--train.batch-tokens", "3072", "--train.accumulation", "3")
    for name in ("model.heads=12: ", "model.kv_heads=12: ", "train.batch_tokens=3072: "):
        assert name in err


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_html_page_that_cannot_be_written_fails_in_one_line(run, tmp_path, words) -> None:
    path = tmp_path / "absent" / "plan.html"
    code, _, err = run(SMALL, *FITS, "--html", path, *words)
    assert code == 73
    assert f"--html={path}: cannot be written" in sentence(err)


def test_unknown_override_is_a_usage_error(run) -> None:
    code, out, err = run(SMALL, *FITS, "--mesh.fdsp", "16")
    assert (code, out) == (2, "")
    assert "--mesh.fsdp" in err


@pytest.mark.parametrize("flag", ["--compile", "--sampling"])
def test_compile_without_libtpu_says_what_to_install(run, monkeypatch, flag) -> None:
    monkeypatch.setitem(sys.modules, "libtpu", None)
    code, out, err = run(SMALL, *FITS, flag)
    assert (code, out) == (2, "")
    assert "pip install 'gptjax[tpu-plan]'" in sentence(err)


# --- with the compiler, which is not here --------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch):
    """A stand-in for the TPU's compiler: its result, and the meshes that it was given."""
    asked = []

    def train_step(cfg, machine):
        asked.append((cfg.mesh.data, cfg.mesh.fsdp))
        return found[0]

    found = [aot.Compiled(3.0, peak=2.0 * 2**30)]
    monkeypatch.setattr(aot, "devices", lambda machine: [])
    monkeypatch.setattr(aot, "train_step", train_step)
    return found, asked


def test_compiled_figures_are_printed_beside_the_prediction(run, compiler) -> None:
    found, asked = compiler
    sum_ = aot.Collective("all-reduce", ("fsdp",), 16, 1e8, 10, "", overlapped=False)
    gather = aot.Collective("all-gather", ("fsdp",), 16, 3e8, 10, "")
    found[0].collectives, found[0].warnings = [sum_, gather], ["an array is gathered whole"]
    code, out, _ = run(SMALL, *FITS, "--compile")
    assert code == 0
    assert asked == [(1, 16)]
    told = out[out.index("compiled ") :]
    predicted = number_after("memory", out)
    assert f"memory: 2.00 GiB of 15.75; predicted {predicted:.2f}" in told
    assert "all: 4.688 GB" in told  # 15/16 of twice 1 GB and of 3
    assert "60% of it overlaps with arithmetic" in told
    assert "warning: an array is gathered whole" in told
    told = json.loads(run(SMALL, *FITS, "--compile", "--json")[1])["compiled"]
    assert told["peak_bytes"] == 2.0 * 2**30
    assert told["out_of_memory"] is None
    assert [one["wire_bytes"] for one in told["collectives"]] == pytest.approx([2.8125e9, 1.875e9])


def test_compiler_out_of_memory_is_told_with_ways_to_fit(run, compiler) -> None:
    found, _ = compiler
    found[0] = aot.Compiled(3.0, out_of_memory="the program (29.50G) exceeds what there is")
    code, out, _ = run(SMALL, *FITS, "--compile")
    assert code == 0
    told = out[out.index("compiled ") :]
    assert "XLA needs 29.5 GiB" in told
    assert "15.75" in told
    assert "--compute.remat" in told


def test_two_best_choices_of_a_search_are_compiled(run, compiler) -> None:
    _, asked = compiler
    code, out, _ = run(SMALL, "--machine", "v5e:4x4", "--search", "--compile")
    assert code == 0
    assert len(asked) == 2
    assert out.count("compiled  by the TPU's compiler") == 2


# --- imports -------------------------------------------------------------------------------------

PROBE = """
import atexit, sys
atexit.register(lambda: print("LOADED", *{m.partition(".")[0] for m in sys.modules}))
from gptjax.cli.main import main
sys.exit(main(["plan", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(
    ("words", "unwanted"),
    [
        (("--help",), {"jax", "numpy", "tensorflow", "libtpu"}),
        pytest.param(
            (SMALL, *FITS), {"tensorflow", "libtpu", "transformers"}, marks=pytest.mark.slow
        ),
    ],
)
def test_plan_imports_neither_tensorflow_nor_libtpu(words, unwanted) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *words], capture_output=True, text=True, check=True
    )
    out, _, loaded = done.stdout.partition("LOADED")
    assert "--machine" in out or "predicted" in out
    assert "gptjax" in loaded.split()
    assert unwanted.isdisjoint(loaded.split())
