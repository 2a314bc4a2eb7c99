"""Reading a compiled program: its collectives, their counts, mesh axes and overlap.

The programs here are written by hand in XLA's text form; test_tpu.py reads real ones.
"""

import textwrap

import pytest

from gptjax.plan import aot
from gptjax.plan.collectives import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    PERMUTE,
    REDUCE_SCATTER,
    Collective,
)

MESH = {"data": 2, "fsdp": 4}

PROGRAM = textwrap.dedent("""\
    HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,128]{1,0})->f32[8,128]}

    %add.1 (x.1: f32[], y.1: f32[]) -> f32[] {
      %x.1 = f32[] parameter(0)
      %y.1 = f32[] parameter(1)
      ROOT %add.2 = f32[] add(%x.1, %y.1)
    }

    %async_scatter.1 (p.1: bf16[64,128]) -> bf16[16,128] {
      %p.1 = bf16[64,128]{1,0} parameter(0)
      ROOT %reduce-scatter.1 = bf16[16,128]{1,0} reduce-scatter(%p.1), channel_id=3, \
    replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add.1, metadata={op_name="layer/scatter"}
    }

    %body.1 (state.1: (s32[], bf16[16,128])) -> (s32[], bf16[16,128]) {
      %state.1 = (s32[], bf16[16,128]{1,0}) parameter(0)
      %w.1 = bf16[16,128]{1,0} get-tuple-element(%state.1), index=1
      %all-gather.1 = bf16[64,128]{1,0} all-gather(%w.1), channel_id=1, \
    replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, metadata={op_name="layer/gather"}
      %kernel.1 = bf16[64,128]{1,0} custom-call(%all-gather.1), \
    custom_call_target="tpu_custom_call", backend_config="{ kernel: first line
    }, and a line that begins like the end of a computation
    last line"
      %scatter-start.1 = ((bf16[64,128]), bf16[16,128], u32[]) async-start(%kernel.1), \
    async_execution_thread="sparsecore", calls=%async_scatter.1
      %scatter-done.1 = bf16[16,128]{1,0} async-done(%scatter-start.1)
      ROOT %tuple.1 = (s32[], bf16[16,128]{1,0}) tuple(%i.1, %scatter-done.1)
    }

    %condition.1 (state.2: (s32[], bf16[16,128])) -> pred[] {
      %state.2 = (s32[], bf16[16,128]{1,0}) parameter(0)
      %limit.1 = s32[]{:T(128)} constant(12)
      %i.2 = s32[]{:T(128)} get-tuple-element(%state.2), index=0
      ROOT %compare.1 = pred[] compare(%i.2, %limit.1), direction=LT
    }

    ENTRY %main.1 (p.2: f32[8,128]) -> f32[8,128] {
      %p.2 = f32[8,128]{1,0} parameter(0)
      %while.1 = (s32[], bf16[16,128]{1,0}) while(%tuple.2), condition=%condition.1, body=%body.1
      ROOT %all-reduce.1 = f32[8,128]{1,0} all-reduce(%p.2), channel_id=4, \
    replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add.1, metadata={op_name="norm"}
    }
""")


def program(*lines, computations=""):
    """A program whose entry has these lines."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m\n\n{computations}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def only(text, shape=MESH):
    (one,) = aot.program_collectives(text, shape)
    return one


def test_collectives_of_a_loop_are_counted_by_its_trip_count() -> None:
    found = {one.kind: one for one in aot.program_collectives(PROGRAM, MESH)}
    assert found == {
        # the gathered array, in a loop of twelve, not overlapped
        ALL_GATHER: Collective(
            ALL_GATHER, ("fsdp",), 4, 64 * 128 * 2, 12, "layer/gather", "layers", overlapped=False
        ),
        # the array before scattering; the program has a part of it
        REDUCE_SCATTER: Collective(
            REDUCE_SCATTER,
            ("fsdp",),
            4,
            64 * 128 * 2,
            12,
            "layer/scatter",
            "layers",
            overlapped=True,
        ),
        ALL_REDUCE: Collective(
            ALL_REDUCE, ("data",), 2, 8 * 128 * 4, 1, "norm", "outside", overlapped=False
        ),
    }


def test_program_without_collectives_has_none() -> None:
    assert list(aot.program_collectives(program("ROOT %c = f32[8] copy(%p)"), MESH)) == []
    assert list(aot.program_collectives("", MESH)) == []


@pytest.mark.parametrize(
    ("groups", "axes", "parts"),
    [
        # devices are numbered with the last axis running fastest: data 0 has 0, 1, 2 and 3
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("fsdp",), 4),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",), 2),
        ("replica_groups={{0,1,2,3,4,5,6,7}}", ("data", "fsdp"), 8),
        ("replica_groups={}", ("data", "fsdp"), 8),
        ("replica_groups=[2,4]<=[8]", ("fsdp",), 4),
        ("replica_groups=[1,8]<=[8]", ("data", "fsdp"), 8),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}", ("fsdp",), 4),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data'}", ("data",), 2),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data','fsdp'}", ("data", "fsdp"), 8),
        # of a mesh that XLA has made itself, with axes of other names
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", ("fsdp",), 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ("data",), 2),
        ("replica_groups=mesh['axis_0'=8] {'axis_0'}", ("data", "fsdp"), 8),
    ],
)
def test_mesh_axes_are_read_from_replica_groups(groups, axes, parts) -> None:
    one = only(program(f"ROOT %g = f32[8] all-gather(%p), {groups}, dimensions={{0}}"))
    assert (one.axes, one.group) == (axes, parts)


def test_axes_of_size_one_are_left_out_of_a_group() -> None:
    shape = {"data": 2, "fsdp": 2, "fsdp_2": 1, "tensor": 2}
    text = program("ROOT %g = f32[8] all-gather(%p), replica_groups={{0,2},{1,3},{4,6},{5,7}}")
    assert only(text, shape).axes == ("fsdp",)
    text = program("ROOT %g = f32[8] all-gather(%p), replica_groups={{0,1,4,5},{2,3,6,7}}")
    assert (only(text, shape).axes, only(text, shape).group) == (("data", "tensor"), 4)


def test_group_of_one_device_is_no_collective() -> None:
    text = program("ROOT %g = f32[8] all-reduce(%p), replica_groups={{0},{1},{2},{3}}")
    assert list(aot.program_collectives(text, MESH)) == []


FSDP = "replica_groups=[2,4]<=[8]"


@pytest.mark.parametrize(
    ("line", "kind", "bytes_", "wire"),
    [
        (f"%c = f32[10,3]{{1,0}} all-gather(%p), {FSDP}", ALL_GATHER, 120, 90),
        (f"%c = s8[10,3] all-gather(%p), {FSDP}", ALL_GATHER, 30, 22.5),
        (f"%c = pred[8] all-to-all(%p), {FSDP}", ALL_TO_ALL, 8, 6),
        (f"%c = f32[] all-reduce(%p), {FSDP}", ALL_REDUCE, 4, 6),
        (f"%c = bf16[4]{{0:T(256)(128)(2,1)}} reduce-scatter(%p), {FSDP}", REDUCE_SCATTER, 32, 24),
        # several at once
        (f"%c = (f32[8], bf16[4,2]) all-reduce(%p, %q), {FSDP}", ALL_REDUCE, 48, 72),
        # begun here and awaited elsewhere: what goes in stands beside what comes out
        (f"%c = (f32[2], f32[8]) all-gather-start(%p), {FSDP}", ALL_GATHER, 32, 24),
        (f"%c = ((bf16[8]), bf16[8]) all-reduce-start(%p), {FSDP}", ALL_REDUCE, 16, 24),
        (
            "%c = (f32[8], f32[8]) collective-permute-start(%p), "
            "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}",
            PERMUTE,
            32,
            32,
        ),
        ("%c = f32[8] collective-permute(%p), source_target_pairs={{0,4},{4,0}}", PERMUTE, 32, 32),
    ],
)
def test_bytes_are_of_the_whole_array_and_wire_bytes_of_one_device(
    line, kind, bytes_, wire
) -> None:
    one = only(program(line))
    assert (one.kind, one.bytes) == (kind, bytes_)
    assert one.wire_bytes == pytest.approx(wire)


def test_axis_of_a_permute_is_where_its_pairs_differ() -> None:
    along = "%c = f32[8] collective-permute(%p), source_target_pairs={{0,1},{1,0}}"
    across = "%c = f32[8] collective-permute(%p), source_target_pairs={{0,4},{4,0}}"
    assert [only(program(line)).axes for line in (along, across)] == [("fsdp",), ("data",)]


# --- counts, loops and overlap -------------------------------------------------------------------

GATHERS = f"  ROOT %g = f32[8] all-gather(%x), {FSDP}\n"
LOOP = """\
%again (s: (s32[])) -> pred[] {{
  %n = s32[] constant({turns})
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}

%work (s: (s32[])) -> (s32[]) {{
{body}}}
"""


@pytest.mark.parametrize("work_before_the_end", [True, False])
def test_a_permute_overlaps_with_what_is_computed_before_its_end(work_before_the_end) -> None:
    start = "%c = (f32[8], f32[8]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}"
    rest = ["%f = f32[8] fusion(%q), kind=kOutput", "%d = f32[8] collective-permute-done(%c)"]
    text = program(start, *(rest if work_before_the_end else reversed(rest)))
    assert only(text).overlapped == work_before_the_end


def test_trip_counts_of_nested_loops_multiply() -> None:
    inner = LOOP.format(turns=3, body=GATHERS)
    outer = LOOP.replace("%again", "%again2").replace("%work", "%work2")
    outer = outer.format(turns=5, body="  %l = (s32[]) while(%s), condition=%again, body=%work\n")
    text = program(
        "%l = (s32[]) while(%s), condition=%again2, body=%work2",
        f"ROOT %h = f32[16] all-gather(%p), {FSDP}",
        computations=inner + outer,
    )
    found = {one.bytes: one for one in aot.program_collectives(text, MESH)}
    assert {size: (one.count, one.where) for size, one in found.items()} == {
        32: (15, "layers"),
        64: (1, "outside"),
    }


def test_collectives_in_and_outside_a_loop_are_counted_separately() -> None:
    text = program(
        "%l = (s32[]) while(%s), condition=%again, body=%work",
        f"%a = f32[8] all-gather(%p), {FSDP}",
        f"%b = f32[8] all-gather(%p), {FSDP}",
        computations=LOOP.format(turns=7, body=GATHERS),
    )
    assert sum(one.count for one in aot.program_collectives(text, MESH)) == 9


def test_computation_without_caller_is_not_counted() -> None:
    idle = f"%idle (x: f32[8]) -> f32[8] {{\n{GATHERS}}}\n"
    assert (
        list(aot.program_collectives(program("%c = f32[8] copy(%p)", computations=idle), MESH))
        == []
    )


@pytest.mark.parametrize(
    ("name", "call", "hidden"),
    [
        ("fused", "fusion(%p), kind=kLoop, calls=%fused", False),
        ("fused", "call(%p), to_apply=%fused", False),
        ("fused", 'async-start(%p), async_execution_thread="sparsecore", calls=%fused', True),
        ("async_collective_fusion.3", "fusion(%p), calls=%async_collective_fusion.3", True),
    ],
)
def test_async_computations_are_overlapped(name, call, hidden) -> None:
    called = f"%{name} (x: f32[8]) -> f32[8] {{\n{GATHERS}}}\n"
    assert only(program(f"%f = f32[8] {call}", computations=called)).overlapped is hidden


def test_start_done_pairs_are_overlapped() -> None:
    assert only(program(f"%c = (f32[2], f32[8]) all-gather-start(%p), {FSDP}")).overlapped
    assert not only(program(f"%c = f32[8] all-gather(%p), {FSDP}")).overlapped


def test_all_reduce_with_dynamic_slice_is_a_reduce_scatter() -> None:
    called = (
        "%all-reduce-scatter.5 (x: f32[8]) -> f32[2] {\n"
        f"  %r = f32[8] all-reduce(%x), {FSDP}\n"
        "  ROOT %d = f32[2] dynamic-slice(%r, %i)\n}\n"
    )
    text = program("%f = f32[2] fusion(%p), calls=%all-reduce-scatter.5", computations=called)
    assert (only(text).kind, only(text).bytes) == (REDUCE_SCATTER, 32)


def test_all_gather_over_several_fusions_is_counted_once() -> None:
    part = (
        "%fused.{n} (x: f32[8]) -> f32[8] {{\n"
        "  ROOT %g = f32[8] all-gather(%x), "
        f"{FSDP}, "
        'frontend_attributes={{chain_id="{chain}"}}\n}}\n'
    )
    parts = "".join(part.format(n=n, chain=chain) for n, chain in ((1, 8), (2, 8), (3, 9)))
    text = program(
        *(f"%f{n} = f32[8] fusion(%p), calls=%fused.{n}" for n in (1, 2, 3)), computations=parts
    )
    found = list(aot.program_collectives(text, MESH))
    assert len(found) == 2
    assert all(one.overlapped for one in found)


# --- the compiler's messages ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "gigabytes"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (53.69G) exceeds available HBM (15.75G). HLO "
            "module: jit__lambda.",
            53.69,
        ),
        ("the allocation (512.0M) exceeds the memory that is there", 0.5),
        ("RESOURCE_EXHAUSTED: something else", 0.0),
        ("", 0.0),
    ],
)
def test_requested_memory_is_read_from_out_of_memory_message(message, gigabytes) -> None:
    assert aot.requested_gib(message) == pytest.approx(gigabytes)


GPU_LOOP = """
%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %ag = ((bf16[4]), bf16[16]) all-gather-start(%x), replica_groups={{0,1,2,3}}, dimensions={0}, backend_config={"collective_backend_config":{"is_sync":SYNC}}
  BETWEEN
  %agd = bf16[16] all-gather-done(%ag)
  %f2 = f32[8] fusion(%agd), kind=kLoop, calls=%fused
}
%cond (p: (s32[], f32[8])) -> pred[] {
  ROOT %c = pred[] fusion(%p), kind=kLoop, calls=%compare
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"31"}}
  %rs = f32[4] reduce-scatter(%y), replica_groups={{0,1,2,3}}, dimensions={0}, metadata={op_name="jvp()/while/body/x"}, backend_config={"collective_backend_config":{"is_sync":true}}
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("sync", "between", "overlapped"),
    [
        ("false", "%f1 = f32[8] fusion(%z), kind=kLoop, calls=%fused", True),
        ("false", "%b = f32[8] bitcast(%z)", False),
        ("true", "%f1 = f32[8] fusion(%z), kind=kLoop, calls=%fused", False),
    ],
)
def test_collectives_of_gpus_overlap_with_what_is_scheduled_meanwhile(
    sync, between, overlapped
) -> None:
    text = GPU_LOOP.replace("SYNC", sync).replace("BETWEEN", between)
    gather, scatter = aot.program_collectives(text, {"fsdp": 4})
    assert (gather.kind, gather.count, gather.bytes) == ("all-gather", 31, 32)
    assert gather.overlapped is overlapped
    assert (scatter.kind, scatter.count, scatter.overlapped) == ("reduce-scatter", 1, False)
    assert gather.where == scatter.where == "layers"  # a turn outside of its loop is one of it


def test_transfers_between_slices_are_collectives() -> None:
    attributes = (
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_megascale_reduce_operation="SUM",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    text = f"""
ENTRY %main (p: bf16[224,8,128]) -> bf16[224,8,128] {{
  %p = bf16[224,8,128]{{2,1,0}} parameter(0)
  %t = token[] after-all()
  %s = (bf16[224,8,128]{{2,1,0}}, u32[], token[]) send(%p, %t), channel_id=6, {attributes}
  %d = token[] send-done(%s), channel_id=6, {attributes}
}}
"""
    (one,) = aot.program_collectives(text, {"data": 2, "fsdp": 16})
    assert (one.kind, one.axes, one.group, one.count) == (ALL_REDUCE, ("data",), 2, 1)
    assert one.bytes == 224 * 8 * 128 * 2
    assert one.overlapped
