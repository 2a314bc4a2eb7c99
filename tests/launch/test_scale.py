"""launch/SCALE.md: its figures equal the planner's output, or follow from its formulae."""

import json
import math
import re
import shlex
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # plans three machines

REPO = Path(__file__).resolve().parents[2]
PAGE = (REPO / "launch" / "SCALE.md").read_text()

Column = dict[str, float]


def columns() -> list[Column]:
    """The figures of each model by symbol."""
    found: list[Column] = [{}, {}, {}]
    for row in re.findall(r"^\|[^|]+\| `(\w+)` \|(.+)\|$", PAGE, re.M):
        values = [float(cell.replace(",", "")) for cell in row[1].split("|")]
        assert len(values) == len(found)
        for column, value in zip(found, values, strict=True):
            column[row[0]] = value
    return found


def derived(v: Column) -> Column:
    """The derived figures of a model by the page's formulae, in the units of its table."""
    chips, hosts, params, step = v["N"], v["H"], v["P"], v["s"]
    parts, fsdp, tensor, data = v["a"], v["f"], v["t"], v["d"]
    weights = 6 * parts * params / tensor * (fsdp - 1) / fsdp
    held = v["B"] / (data * fsdp)
    activations = 22 * v["L"] * v["D"] * (tensor - 1) / tensor * held
    size = 12 * params
    write = size / (v["W"] * 1e9)
    failures = chips * 419 / (54 * 16_384)
    between = 86_400 / failures
    young = math.sqrt(2 * write * between)
    x = write / (2 * between)
    daly = young * (1 + math.sqrt(x) / 3 + x / 9) - write
    lost = write / daly + (daly / 2 + v["R"]) / between
    local = size * data / hosts
    copy = local / (v["W_m"] * 1e9)
    x = copy / (2 * between)
    often = math.sqrt(2 * copy * between) * (1 + math.sqrt(x) / 3 + x / 9) - copy
    often = max(often, local / (v["W_d"] * 1e9))
    return {
        "ici_f": (weights + activations) / 1e9,
        "dcn_f": 2 * (data - 1) / data * 2 * params / (fsdp * tensor) / 1e9,
        "C": size / 1e9,
        "C_h": size / hosts / 1e9,
        "w": write,
        "in": 4 * v["B"] / (hosts * step) / 1e3,
        "F": failures,
        "M": between / 3600,
        "young": young,
        "daly": daly,
        "every": daly / step,
        "lost": 100 * lost,
        "days_f": v["days"] / (1 - lost),
        "C_l": local / 1e9,
        "c": copy,
        "w_l": local / (v["W_d"] * 1e9),
        "w_b": size / hosts / (v["W_b"] * 1e9),
        "daly_c": often,
        "every_c": often / step,
        "lost_c": 100 * (copy / often + (often / 2 + v["R"]) / between),
    }


COMMANDS = re.findall(r"^gptjax plan .* --json$", PAGE, re.M)
COLUMNS = columns()


def test_page_has_three_plans_and_defines_every_symbol() -> None:
    assert len(COMMANDS) == len(COLUMNS) == 3
    symbols = set(derived(COLUMNS[0]))
    assert symbols <= set(COLUMNS[0])
    for symbol in symbols:
        assert re.search(rf"`[^`]*\b{symbol} = ", PAGE), symbol


@pytest.mark.parametrize("place", range(3))
def test_derived_figures_follow_from_the_formulae(place: int) -> None:
    column = COLUMNS[place]
    for symbol, value in derived(column).items():
        assert column[symbol] == pytest.approx(value, rel=6e-3), symbol


@pytest.mark.parametrize("place", range(3))
def test_planned_figures_equal_the_planner_output(place: int, command_line, monkeypatch) -> None:
    monkeypatch.chdir(REPO)
    code, out, err = command_line(*shlex.split(COMMANDS[place])[1:])
    assert code == 0, err
    plan = json.loads(out)
    mesh = plan["mesh"]
    sent = {True: 0.0, False: 0.0}
    for one in plan["collectives"]:
        sent["data" in one["axes"]] += one["wire_bytes"] / 1e9
    planned = {
        "N": plan["devices"],
        "d": mesh["data"],
        "f": mesh["fsdp"] * mesh["fsdp_2"] * mesh["fsdp_3"],
        "t": mesh["tensor"],
        "mem": plan["memory_total_bytes"] / 2**30,
        "s": plan["step_seconds"],
        "mfu": 100 * plan["mfu"],
        "ici": sent[False],
        "dcn": sent[True],
        "link": max(plan["link_seconds"].values()),
        "bare": plan["exposed_seconds"],
        "days": plan["days"],
    }
    column = COLUMNS[place]
    for symbol, value in planned.items():
        assert column[symbol] == pytest.approx(value, rel=6e-3, abs=1e-3), symbol
    assert plan["fits"]
    # The formulae are the planner's, but for norms, and what is padded.
    assert column["ici_f"] == pytest.approx(column["ici"], rel=0.01)
    assert column["dcn_f"] == pytest.approx(column["dcn"], rel=0.03)


@pytest.mark.parametrize("place", range(3))
def test_given_figures_equal_those_of_preset_and_machine(place: int, monkeypatch) -> None:
    from gptjax.cli import arguments, main
    from gptjax.model.flops import ModelCost
    from gptjax.plan import machines

    monkeypatch.chdir(REPO)
    args, rest = main.parser().parse_known_args(shlex.split(COMMANDS[place])[1:])
    cfg, column = arguments.resolve(args, rest), COLUMNS[place]
    assert column["P"] == ModelCost(cfg.model).parameters.total
    assert (column["L"], column["D"]) == (cfg.model.layers, cfg.model.embed)
    assert (column["B"], column["a"]) == (cfg.train.batch_tokens, cfg.train.accumulation)
    assert column["H"] == machines.parse(args.machine).processes
    assert cfg.model.vocab_size > 1 << 16  # or tokens are two bytes
