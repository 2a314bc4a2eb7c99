"""The search: choices fit, are ordered and can be pasted; remedies where a plan does not fit."""

import functools
import itertools
from pathlib import Path

import pytest

from gptjax import config
from gptjax.errors import ConfigError
from gptjax.plan import estimate, memory, search
from gptjax.plan.machines import parse

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL, LLAMA, MIXTRAL = (
    str(CONFIGS / name)
    for name in ("gpt2.py:small", "llama.py:llama3_8b", "mixtral.py:mixtral_8x7b")
)
WAYS = [
    (SMALL, "v5e:2x2"),
    pytest.param((LLAMA, "h100:16"), marks=pytest.mark.slow),
    pytest.param((MIXTRAL, "v5p:4x4x4"), marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def fronts():
    """`fronts(way)` is the front of one of WAYS."""

    @functools.cache
    def of(way):
        return search.pareto_front(config.resolve(way[0], [], "gptjax plan"), parse(way[1]))

    return of


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_pareto_front_is_ordered_by_time_and_memory(fronts, way) -> None:
    choices = fronts(way)
    assert len(choices) > 1
    times = [one.plan.times.expected for one in choices]
    assert times == sorted(times)
    held = [one.plan.total for one in choices]
    assert all(later < earlier for earlier, later in itertools.pairwise(held))
    assert all(one.plan.fits for one in choices)
    assert all(one.plan.machine.name == way[1] for one in choices)


@pytest.mark.parametrize("way", WAYS)
def test_overrides_of_a_choice_give_its_plan(fronts, way) -> None:
    for one in fronts(way):
        words = " ".join(one.overrides).split()
        pasted = config.resolve(way[0], words, "gptjax plan")
        cfg = one.plan.cfg
        assert (pasted.mesh, pasted.compute) == (cfg.mesh, cfg.compute)
        assert pasted.train == cfg.train
        again = estimate.plan(pasted, one.plan.machine, one.plan.state)
        assert again.total == one.plan.total
        assert again.times == one.plan.times


@pytest.mark.parametrize("way", WAYS)
def test_search_keeps_slices_on_data_and_tensor_within_a_node(fronts, way) -> None:
    for one in fronts(way):
        slow = {axis for axis, link in one.plan.links.items() if link.kind == "network"}
        assert "tensor" not in slow
        if one.plan.machine.device.platform == "tpu":  # through nodes of GPUs, fsdp may run, too
            assert slow <= {"data"}
            assert one.plan.sizes["data"] % one.plan.machine.slices == 0


def test_search_finds_plans_over_several_gpu_nodes() -> None:
    cfg = config.load(LLAMA.replace("llama3_8b", "llama3_70b"))
    found = search.pareto_front(cfg, parse("h100:64"))
    state = 70e9 * 12 / 8  # of which a node's devices would hold this much each
    assert all(one.plan.total < one.plan.machine.device.memory < state for one in found)


@pytest.mark.slow
def test_search_tries_expert_axis_only_for_mixtures(fronts) -> None:
    assert {one.plan.sizes["expert"] for one in fronts((SMALL, "v5e:2x2"))} == {1}
    assert max(one.plan.sizes["expert"] for one in fronts((MIXTRAL, "v5p:4x4x4"))) > 1


def test_fastest_choice_is_no_slower_than_single_plans(fronts) -> None:
    fastest = fronts((SMALL, "v5e:2x2"))[0].plan.times.expected
    planned = 0
    for mesh in (["--mesh.fsdp", "4"], ["--mesh.fsdp", "2", "--mesh.data", "2"]):
        for remat in ("none", "dots", "block"):
            words = [*mesh, "--compute.remat", remat, "--train.accumulation", "32"]
            cfg = config.resolve(SMALL, words, "gptjax plan")
            plan = estimate.plan(cfg, parse("v5e:2x2"))
            if plan.fits:
                planned += 1
                assert fastest <= plan.times.expected
    assert planned


def test_search_where_nothing_fits_raises_with_advice() -> None:
    cfg = config.resolve(str(CONFIGS / "llama.py:llama31_405b"), [], "gptjax plan")
    with pytest.raises(ConfigError) as caught:
        search.pareto_front(cfg, parse("v5e:2x2"))
    (problem,) = caught.value.problems
    assert problem.startswith("--search: ")
    for part in (cfg.run, "v5e:2x2", "more devices", "train.batch_tokens"):
        assert part in problem


def test_a_ring_is_tried_where_gathered_keys_do_not_fit() -> None:
    tokens = str(2**19)
    words = ["--model.context", tokens, "--train.seq-len", tokens, "--train.batch-tokens", tokens]
    cfg = config.resolve("gpt2:small", words, "gptjax plan")
    choices = list(search._all(cfg, parse("v5e:4x4"), memory.tensors(cfg), []))
    rings = [i for i, one in enumerate(choices) if "--compute.attention ring" in one.overrides]
    assert 0 < len(rings) < len(choices)
    for i in rings:
        gathered, ring = choices[i - 1].plan, choices[i].plan
        assert (gathered.attention, ring.attention) == (("splash",), ("ring",))
        assert not gathered.fits
        assert choices[i].overrides[:-1] == choices[i - 1].overrides
    assert any(choices[i].plan.fits for i in rings)


# --- a plan that does not fit --------------------------------------------------------------------


def plan_of(preset, machine, *words):
    return estimate.plan(config.resolve(preset, words, "gptjax plan"), parse(machine))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "machine", "words"),
    [
        (SMALL, "v5e:2x2", ("--mesh.data", "4", "--compute.remat", "none")),
        (LLAMA, "v5e:4x4", ("--mesh.fsdp", "16", "--compute.remat", "none")),
        (LLAMA, "h100:8", ("--mesh.fsdp", "8", "--compute.remat", "dots")),
    ],
)
def test_remedies_fit_and_are_ordered_by_time(preset, machine, words) -> None:
    planned = plan_of(preset, machine, *words)
    assert not planned.fits
    found = search.remedies(planned)
    assert 1 <= len(found) <= 3
    times = [one.plan.times.expected for one in found]
    assert times == sorted(times)
    for one in found:
        assert one.plan.fits
        assert one.plan.total < planned.total
        again = plan_of(preset, machine, *words, *" ".join(one.overrides).split())
        assert again.fits
        assert again.total == one.plan.total


def test_remedies_offer_each_single_change_once() -> None:
    planned = plan_of(SMALL, "v5e:2x2", "--mesh.data", "4", "--compute.remat", "none")
    changes = []
    for one in search.remedies(planned, most=9):
        cfg, old = one.plan.cfg, planned.cfg
        changes.append(
            (
                cfg.mesh != old.mesh,
                cfg.compute.remat != old.compute.remat,
                cfg.train.accumulation != old.train.accumulation,
            )
        )
    alone = [change for change in changes if sum(change) == 1]
    assert len(alone) == len(set(alone)) > 1
    assert len(changes) - len(alone) <= 1  # of changes of several things the fastest alone
    assert not any(sum(change) == 0 for change in changes)


def test_remedies_offer_the_fastest_of_each_single_change() -> None:
    words = ("--mesh.data", "4", "--compute.remat", "none")
    planned = plan_of(SMALL, "v5e:2x2", *words)
    ways = [("--train.accumulation", str(2**n)) for n in range(1, 8)]
    alone = [plan_of(SMALL, "v5e:2x2", *words, *way) for way in ways]
    fastest = min(one.times.expected for one in alone if one.fits)
    assert sum(one.fits for one in alone) > 1
    (offered,) = [
        one.plan
        for one in search.remedies(planned, most=9)
        if (one.plan.cfg.mesh, one.plan.cfg.compute) == (planned.cfg.mesh, planned.cfg.compute)
    ]
    assert offered.times.expected == fastest


def test_remedies_beyond_the_limit_are_the_slowest() -> None:
    planned = plan_of(SMALL, "v5e:2x2", "--mesh.data", "4", "--compute.remat", "none")
    every, one = search.remedies(planned, most=9), search.remedies(planned, most=1)
    assert len(every) > 1
    assert [choice.overrides for choice in one] == [every[0].overrides]


def test_no_remedies_where_no_change_fits() -> None:
    planned = plan_of(
        str(CONFIGS / "llama.py:llama31_405b"), "v5e:2x2", "--mesh.data", "1", "--mesh.fsdp", "4"
    )
    assert not planned.fits
    assert search.remedies(planned) == []


def test_a_growing_batch_narrows_no_search_and_gets_sizes_that_the_mesh_divides() -> None:
    """The published recipe begins with 16 sequences, which few meshes divide."""
    cfg = config.load("gpt3:gpt3_1_3b")
    choices = search.pareto_front(cfg, parse("h100:64"))
    assert max(one.plan.sizes["fsdp"] * one.plan.sizes["data"] for one in choices) > 16
    for one in choices:
        words = " ".join(one.overrides).split()
        pasted = config.resolve("gpt3:gpt3_1_3b", words, "gptjax plan")
        pasted.check(64, 8)
        assert pasted.train.batch_ramp_tokens == cfg.train.batch_ramp_tokens
