"""The course of a run by its configuration: growing batches, stages, what a resume may change."""

import itertools
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import config
from gptjax.config import (
    Config,
    DataConfig,
    EvalConfig,
    MixturePart,
    ModelConfig,
    OptimConfig,
    StageConfig,
    TrainConfig,
)
from gptjax.config import phases as course
from gptjax.errors import ConfigError, MismatchError

ROPE = ModelConfig(positions="rope", context=64)


def run_of(stages=None, **train) -> Config:
    train = {"tokens": 10_000, "batch_tokens": 64, "seq_len": 16} | train
    evaluation = EvalConfig(sample_tokens=8)
    return Config(model=ROPE, train=TrainConfig(**train), eval=evaluation, stages=stages or {})


def shapes(cfg: Config) -> list[tuple]:
    return [(p.stage, p.first, p.last, p.tokens, p.batch, p.seq_len) for p in course.phases(cfg)]


# --- phases --------------------------------------------------------------------------------------


def test_a_plain_run_has_one_phase() -> None:
    cfg = run_of()
    assert shapes(cfg) == [("", 0, 157, 0, 4, 16)]
    assert cfg.steps == 157  # 10,000 / 64, rounded up


def test_a_batch_grows_in_equal_stretches_of_tokens() -> None:
    cfg = run_of(batch_ramp_tokens=900, batch_start_tokens=16, batch_increment_tokens=16)
    # 16, 32 and 48 tokens for 300 tokens each; a step is done before its size is looked at again.
    assert shapes(cfg) == [
        ("", 0, 19, 0, 1, 16),
        ("", 19, 29, 304, 2, 16),
        ("", 29, 35, 624, 3, 16),
        ("", 35, 177, 912, 4, 16),
    ]
    # A third of 961 tokens is more than 20 steps of 16.
    cfg = run_of(batch_ramp_tokens=961, batch_start_tokens=16, batch_increment_tokens=16)
    assert shapes(cfg)[0] == ("", 0, 21, 0, 1, 16)


def test_stages_end_where_their_tokens_together_do() -> None:
    stages = {
        "short": StageConfig(tokens=1000),
        "rest": StageConfig(),
        "long": StageConfig(tokens=2000, seq_len=64, batch_tokens=256),
    }
    cfg = run_of(stages)
    cfg.check()
    assert course.ends(cfg) == {"short": 1000, "rest": 8000, "long": 10_000}
    # The last batch of a stage ends after it, and the next stage is that much shorter.
    assert shapes(cfg) == [
        ("short", 0, 16, 0, 4, 16),
        ("rest", 16, 125, 1024, 4, 16),
        ("long", 125, 133, 8000, 4, 64),
    ]
    assert course.borders(cfg) == {16, 125}


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(100, 3000), min_size=1, max_size=5),
    sizes=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    ramp=st.integers(0, 800),
)
def test_phases_are_without_gaps_and_tokens_add_up(lengths, sizes, ramp) -> None:
    stages = {
        f"s{n}": StageConfig(tokens=tokens, batch_tokens=16 * sizes[n])
        for n, tokens in enumerate(lengths)
    }
    given_ramp = {"batch_ramp_tokens": ramp, "batch_start_tokens": 16, "batch_increment_tokens": 16}
    cfg = run_of(stages, tokens=sum(lengths), **(given_ramp if ramp else {}))
    found = course.phases(cfg)
    seen = step = 0
    for phase in found:
        assert (phase.first, phase.tokens) == (step, seen)
        assert phase.last > phase.first
        for step in range(phase.first, phase.last):
            assert course.phase_at(found, step) is phase
            assert course.tokens_at(cfg, step) == seen
            seen += phase.batch_tokens
        step = phase.last
    assert 0 <= seen - sum(lengths) < 16 * 9
    cut = list(course.between(found, 3, step + 5))
    assert (cut[0].first, cut[-1].last) == (3, step + 5)
    assert all(one.last == other.first for one, other in itertools.pairwise(cut))


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 64),
    full=st.integers(1, 64),
    unit=st.sampled_from([1, 2, 3, 8]),
    accumulation=st.integers(1, 8),
    length=st.sampled_from([1, 2, 4]),
)
def test_no_phase_has_more_tokens_on_a_device_than_the_largest_step(
    batch, full, unit, accumulation, length
) -> None:
    full *= unit * accumulation
    cfg = run_of(batch_tokens=full * 16, accumulation=accumulation)
    phase = course.Phase("", 0, 1, 0, batch * unit, 16 * length)
    count = course.accumulation_of(cfg, phase, unit)
    rows = phase.batch // count
    assert phase.batch % count == 0
    assert rows % unit == 0
    most = full // accumulation * 16
    fits = lambda n: phase.batch // n * phase.seq_len <= most
    if rows > unit:
        assert fits(count)
    fewer = [n for n in range(1, count) if phase.batch % (n * unit) == 0]
    assert not any(map(fits, fewer))  # as few steps as that allows


def test_the_full_batch_is_split_as_train_accumulation_says() -> None:
    cfg = run_of(accumulation=4)
    assert course.accumulation_of(cfg, course.phases(cfg)[0]) == 4


def test_a_stage_stretches_the_rotary_positions_of_its_model_only() -> None:
    stages = {"one": StageConfig(tokens=640), "two": StageConfig(rope_theta=5e5)}
    cfg = run_of(stages)
    assert course.trained(cfg, 10).model == cfg.model  # ten steps, all of the first stage
    after = course.trained(cfg, 11).model
    assert after == replace(cfg.model, rope=replace(cfg.model.rope, theta=5e5))
    assert (
        course.of_stage(cfg, "two", {"data": 1, "fsdp": 1, "expert": 1, "stage": 1}).model == after
    )


def test_a_shorter_run_leaves_out_the_stages_that_it_does_not_reach() -> None:
    cfg = run_of({name: StageConfig(tokens=2500) for name in "abcd"})
    short = course.shortened(cfg, 50)
    assert {name: one.tokens for name, one in short.stages.items()} == {"a": 2500, "b": 700}
    assert (short.train.tokens, short.steps) == (3200, 50)
    assert course.phases(short)[0] == course.phases(cfg)[0]


def test_a_run_that_ends_near_a_border_has_no_stage_without_a_step() -> None:
    """The last batch of a stage reaches into the next one, which is not begun."""
    cfg = run_of({name: StageConfig(tokens=2490) for name in "abcd"}, tokens=9960)
    at_border = course.phases(cfg)[0].last
    short = course.shortened(cfg, at_border)
    short.check()
    assert (list(short.stages), short.steps) == (["a"], at_border)
    growing = run_of(batch_ramp_tokens=900, batch_start_tokens=16, batch_increment_tokens=16)
    assert course.phases(course.shortened(growing, 25))[0] == course.phases(growing)[0]


def test_parts_have_the_shares_of_all_stages() -> None:
    data = DataConfig(mixture={"web": MixturePart(3.0, ("x",)), "code": MixturePart(1.0, ("y",))})
    stages = {"a": StageConfig(tokens=7500), "b": StageConfig(weights={"code": 2.0})}
    cfg = replace(run_of(stages, tokens=10_000, batch_tokens=80), data=data)
    assert course.shares_of(cfg) == pytest.approx({"web": 0.5625, "code": 0.4375}, rel=0.01)


# --- what is refused -----------------------------------------------------------------------------

MIXED = DataConfig(mixture={"web": MixturePart(1.0, ("x",)), "code": MixturePart(0.0, ("y",))})
RAMP = {"batch_ramp_tokens": 900, "batch_start_tokens": 16, "batch_increment_tokens": 16}
REFUSED = {
    "two without a length": (run_of({"a": StageConfig(), "b": StageConfig()}), "stages.b.tokens=0"),
    "another sum": (run_of({"a": StageConfig(tokens=9)}), "train.tokens=10000: the stages have 9"),
    "nothing left": (
        run_of({"a": StageConfig(), "b": StageConfig(tokens=10_000)}),
        "stages.a.tokens=0: the other stages have 10000 tokens",
    ),
    "no step": (
        run_of({"a": StageConfig(), "b": StageConfig(tokens=4)}, tokens=10_004),
        "stages.b.tokens=4: the last batch of the stage before is longer",
    ),
    "longer than the context": (
        run_of({"a": StageConfig(seq_len=128)}, batch_tokens=128),
        "above model.context=64",
    ),
    "no multiple": (run_of({"a": StageConfig(batch_tokens=70)}), "not a multiple of the stage's"),
    "a part that is not there": (
        run_of({"a": StageConfig(weights={"web": 1.0})}),
        "stages.a.weights.web=1.0: no part of that name; known: there is no data.mixture",
    ),
    "no weight at all": (
        replace(run_of({"a": StageConfig(weights={"web": 0.0, "code": 0.0})}), data=MIXED),
        "stages.a.weights: are all 0",
    ),
    "no weight in the mixture": (
        replace(
            run_of({"a": StageConfig(weights={"code": 1.0})}),
            data=DataConfig(mixture={"code": MixturePart(0.0, ("y",))}),
        ),
        "data.mixture: all weights are 0",
    ),
    "a factor of no scaling": (
        run_of({"a": StageConfig(rope_factor=4.0)}),
        "stages.a.rope_factor=4.0: requires stages.a.rope_scaling",
    ),
    "a ramp that no stage has": (
        run_of({"a": StageConfig(batch_tokens=128)}, **RAMP),
        "train.batch_ramp_tokens=900: not used, as no stage that has",
    ),
    "a warm-up that no stage has": (
        replace(
            run_of({"a": StageConfig(lr_schedule="linear")}), optim=OptimConfig(warmup_tokens=64)
        ),
        "optim.warmup_tokens=64: not used, as the first stage has",
    ),
    "a part that no stage uses": (replace(run_of(), data=MIXED), "data.mixture.code.weight=0.0"),
    "a rate that is not used": (
        run_of({"a": StageConfig(lr_ratio=0.5)}),
        "stages.a.lr_ratio=0.5: requires stages.a.lr_schedule",
    ),
    "an end of a constant": (
        run_of({"a": StageConfig(lr_schedule="constant", final_lr_ratio=0.5)}),
        "stages.a.final_lr_ratio=0.5: not used by",
    ),
    "a rate above the peak": (
        run_of({"a": StageConfig(lr_schedule="linear", lr_ratio=1.5)}),
        "stages.a.lr_ratio=1.5: must be from 0 to 1",
    ),
    "RoPE without its context": (
        run_of({"a": StageConfig(rope_scaling="yarn", rope_factor=4.0)}),
        "stages.a: of its rotary positions, model.rope.original_context=0: required",
    ),
    "RoPE of another model": (
        replace(run_of({"a": StageConfig(rope_theta=1e6)}), model=ModelConfig()),
        "stages.a.rope_theta=1000000.0: requires model.positions=rope",
    ),
    "a name": (run_of({"a/b": StageConfig()}), "stages.a/b: the name of a stage has letters"),
    "a negative length": (run_of({"a": StageConfig(tokens=-1)}), "must not be negative"),
    "a start without a ramp": (run_of(batch_start_tokens=16), "requires train.batch_ramp_tokens"),
    "an odd start": (
        run_of(**RAMP | {"batch_start_tokens": 17}),
        "must be a multiple of train.seq",
    ),
    "a start above": (run_of(**RAMP | {"batch_start_tokens": 64}), "must be below train.batch_tok"),
    "an increment that does not fit": (
        run_of(**RAMP | {"batch_increment_tokens": 32}),
        "does not divide the 48 tokens from train.batch_start_tokens to train.batch_tokens; use "
        "16 or 48",
    ),
    "a ramp that does not end": (
        run_of(**RAMP | {"batch_ramp_tokens": 10_000}),
        "train.batch_ramp_tokens=10000: must be below train.tokens=10000",
    ),
    "a ramp's sizes in a longer stage": (
        run_of({"a": StageConfig(seq_len=32)}, **RAMP),
        "stages.a.seq_len=32: the growing batch has sizes that are no multiple of it, by 16",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_stages_and_batches_are_refused_by_name(case: str) -> None:
    cfg, told = REFUSED[case]
    with pytest.raises(ConfigError, match=re.escape(told)) as caught:
        cfg.check()
    assert len(caught.value.problems) == 1, caught.value.problems


def test_every_size_of_a_batch_is_checked_on_the_mesh() -> None:
    cfg = run_of(**RAMP)
    cfg.check(1)
    cfg.check(1)
    with pytest.raises(
        ConfigError, match=r"start_tokens=16: a batch of 1 .* use --train.batch-ramp"
    ):
        cfg.check(4)
    cfg = run_of(**RAMP | {"batch_tokens": 768})
    with pytest.raises(ConfigError) as caught:
        cfg.check(4)
    (problem,) = caught.value.problems
    start, increment = map(int, re.findall(r"-tokens (\d+)", problem))
    assert (start, increment) == (64, 64)
    of_mesh = {"batch_start_tokens": start, "batch_increment_tokens": increment}
    replace(cfg, train=replace(cfg.train, **of_mesh)).check(4)
    cfg = run_of({"a": StageConfig(tokens=5000), "b": StageConfig(batch_tokens=96)})
    with pytest.raises(ConfigError, match=r"stages.b.batch_tokens=96: a batch of 6 .* use 128"):
        cfg.check(4)
    mesh = replace(cfg.mesh, context=2)
    cfg = replace(run_of({"a": StageConfig(seq_len=2, batch_tokens=64)}), mesh=mesh)
    with pytest.raises(ConfigError, match=r"stages.a.seq_len=2: mesh axis 2 x context=4"):
        cfg.check(2)


def test_a_mesh_that_leaves_no_room_for_steps_has_one_of_all_that_is_left() -> None:
    ramp = {"batch_ramp_tokens": 900, "batch_start_tokens": 160, "batch_increment_tokens": 96}
    cfg = run_of(batch_tokens=256, **ramp)
    with pytest.raises(ConfigError, match=r"-start-tokens 192 --train.batch-increment-tokens 64"):
        cfg.check(4)


def test_stages_of_a_preset_are_left_out_by_name() -> None:
    cfg = run_of({"a": StageConfig()})
    assert config.override(cfg, ["--stages", "none"], "gptjax").stages == {}
    words = ["--stages", "none", "--stages.b.seq-len", "8"]
    assert config.override(cfg, words, "gptjax").stages == {"b": StageConfig(seq_len=8)}


def test_stages_are_named_on_the_command_line() -> None:
    words = [
        *("--stages.main.tokens", "10", "--stages.long.seq_len=32"),
        *("--stages.long.weights.web", "0.5", "--stages.long.weights.code", "0.25"),
    ]
    cfg = config.override(replace(run_of(), data=MIXED), words, "gptjax")
    assert cfg.stages == {
        "main": StageConfig(tokens=10),
        "long": StageConfig(seq_len=32, weights={"web": 0.5, "code": 0.25}),
    }
    assert list(cfg.stages) == ["main", "long"]  # as they are named
    again = config.from_dict(config.to_dict(cfg))
    assert again == cfg
    assert list(again.stages) == ["main", "long"]


# --- resuming ------------------------------------------------------------------------------------

BEGUN = run_of(
    {"one": StageConfig(tokens=640), "two": StageConfig(tokens=640), "three": StageConfig()},
    tokens=6400,
)


def with_stage(name: str, **fields) -> Config:
    return replace(BEGUN, stages=BEGUN.stages | {name: replace(BEGUN.stages[name], **fields)})


@pytest.mark.parametrize("step", [10, 15, 20])
@pytest.mark.parametrize(
    "fields",
    [{"seq_len": 32}, {"batch_tokens": 128}, {"rope_theta": 1e6}, {"tokens": 700}],
    ids=lambda fields: next(iter(fields)),
)
def test_a_stage_may_change_until_it_begins(step: int, fields: dict) -> None:
    """Stage one has steps 0 to 9, stage two 10 to 19."""
    with pytest.raises(MismatchError):
        config.resume_changes(BEGUN, with_stage("one", **fields), step)
    (name,) = fields
    if step == 10 or (step < 20 and name == "tokens"):
        (told,) = config.resume_changes(BEGUN, with_stage("two", **fields), step)
        assert told.startswith(f"stages.two.{name}: ")
    else:
        with pytest.raises(MismatchError):
            config.resume_changes(BEGUN, with_stage("two", **fields), step)
    assert len(config.resume_changes(BEGUN, with_stage("three", **fields), step)) == 1


def test_what_has_begun_is_named_where_it_is_refused() -> None:
    with pytest.raises(MismatchError) as caught:
        config.resume_changes(BEGUN, with_stage("two", seq_len=32), 15)
    assert caught.value.differences == ["stages.two.seq_len: 16 at step 10 in the run, 32 given"]
    with pytest.raises(MismatchError) as caught:
        config.resume_changes(BEGUN, with_stage("one", lr_schedule="constant"), 15)
    assert caught.value.differences == ["stages.one: is over since step 10, and cannot change"]


def test_the_order_and_the_end_of_stages_count() -> None:
    swapped = {name: BEGUN.stages[name] for name in ("one", "three", "two")}
    told = config.resume_changes(BEGUN, replace(BEGUN, stages=swapped), 10)
    assert told == ["stages: one, two, three -> one, three, two (stage)"]
    open_first = {"one": StageConfig(), "two": StageConfig(tokens=640)}
    cfg = run_of(open_first, tokens=1280)
    longer = replace(cfg, train=replace(cfg.train, tokens=1920))
    assert len(config.resume_changes(cfg, longer, 9)) == 1
    with pytest.raises(MismatchError):
        config.resume_changes(cfg, longer, 10)


def test_stages_can_be_added_to_a_run_that_has_none() -> None:
    plain = run_of(tokens=640)
    longer = run_of({"main": StageConfig(tokens=640), "long": StageConfig(seq_len=64)}, tokens=1280)
    changes = config.resume_changes(plain, longer, 10)
    assert any(line.startswith("stages.long.seq_len: None -> 64") for line in changes)
    other = run_of({"main": StageConfig(tokens=320), "long": StageConfig(seq_len=64)}, tokens=1280)
    with pytest.raises(MismatchError, match=r"stages.long.seq_len: 16 at step 5 in the run, 64"):
        config.resume_changes(plain, other, 10)
