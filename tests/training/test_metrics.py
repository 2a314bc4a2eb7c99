"""Writers that survive, and the arithmetic of MFU."""

import contextlib
import io
import json
import math
import socket
import tempfile
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import config
from gptjax.checkpoint import listing
from gptjax.config import Config, LogConfig
from gptjax.runtime import hardware
from gptjax.training import metrics
from gptjax.training.metrics import JsonlWriter, Throughput, Writers


class Recorder:
    def __init__(self):
        self.written, self.closed = [], False

    def write(self, step, values):
        self.written.append((step, dict(values)))

    def close(self):
        self.closed = True


class FailingWrite(Recorder):
    def write(self, step, values):
        super().write(step, values)
        raise OSError("disk full")


class FailingClose(Recorder):
    def close(self):
        raise OSError("disk full")


def lines(folder):
    """The objects of metrics.jsonl, without the times, which each of them has."""
    found = [json.loads(line) for line in (folder / metrics.METRICS_FILE).read_text().splitlines()]
    for entry in found:
        assert abs(entry.pop("time", time.time()) - time.time()) < 600
    return found


def without_time(line):
    """A line without the time of what was evaluated, which follows the training's."""
    return {name: value for name, value in line.items() if name != listing.EVALUATED}


def test_jsonl_writes_an_object_a_line_at_once(tmp_path):
    writer = JsonlWriter(tmp_path, 0)
    writer.write(1, {"loss": 2.5})
    writer.write(2, {"loss": 2.25, "lr": 1e-3})
    assert lines(tmp_path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25, "lr": 1e-3}]
    writer.close()


def test_jsonl_resume_drops_lines_after_its_step_and_goes_on(tmp_path):
    writer = JsonlWriter(tmp_path, 0)
    for step in (10, 20, 30):
        writer.write(step, {"loss": float(step)})
    writer.close()
    writer = JsonlWriter(tmp_path, 20)
    assert [line["step"] for line in lines(tmp_path)] == [10, 20]
    writer.write(30, {"loss": -1.0})
    writer.close()
    assert lines(tmp_path)[-1] == {"step": 30, "loss": -1.0}


def test_jsonl_resume_drops_what_is_measured_again_at_its_step(tmp_path):
    writer = JsonlWriter(tmp_path, 0)
    for step in (10, 20):
        writer.write(step, {"loss": 1.0})
        writer.write(step, {"valid_loss": 2.0})
    writer.close()
    entry = {"step": 20, "loss": 1.0}
    measured = {"valid_loss": 2.0}
    assert [without_time(line) for line in lines(tmp_path)] == [
        entry | {"step": 10} | measured,
        entry | measured,
    ]
    writer = JsonlWriter(tmp_path, 20)
    assert lines(tmp_path)[1] == entry
    writer.write(20, {"valid_loss": 3.0})
    writer.write(21, {"valid_loss": 4.0})
    writer.close()
    assert [without_time(line) for line in lines(tmp_path)[1:]] == [
        entry | {"valid_loss": 3.0},
        {"step": 21, "valid_loss": 4.0},
    ]
    trained, *evaluated = list(listing.read_rows(tmp_path / listing.METRICS_FILE))[2:]
    assert "valid_loss" not in trained
    assert [(row["step"], row["valid_loss"]) for row in evaluated] == [(20, 3.0), (21, 4.0)]


@pytest.mark.parametrize("cut", ['{"step": 2', '{"step": 2, "loss": 1.0}', '{"st'])
def test_jsonl_resume_drops_a_last_line_that_a_kill_has_cut(tmp_path, cut):
    (tmp_path / metrics.METRICS_FILE).write_text('{"step": 1, "loss": 2.0}\n' + cut)
    writer = JsonlWriter(tmp_path, 5)
    writer.write(6, {"loss": 1.5})
    writer.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 6]


@settings(max_examples=100, deadline=None)
@given(
    damage=st.one_of(
        st.binary(min_size=1, max_size=300),
        st.sampled_from([b"\0" * 200, b"3\n", b"{}\n", b'{"step": "x"}\n', b"[" * 5000 + b"\n"]),
        st.sampled_from([b"\r", b'{"step":\r2}\n']),
    ),
    place=st.integers(0, 3),
)
def test_a_damaged_file_is_set_aside_and_told_and_never_stops_a_run(damage, place):
    whole = [b'{"step": %d, "loss": 2.0}\n' % step for step in (1, 2, 3)]
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()) as said:
        folder = Path(name)
        raw = b"".join([*whole[:place], damage, *whole[place:]])
        (folder / metrics.METRICS_FILE).write_bytes(raw)
        writer = JsonlWriter(folder, 5)
        writer.write(6, {"loss": 1.5})
        writer.close()
        kept = [line["step"] for line in lines(folder)]
        # Damage without an end of line takes the line behind it along.
        joined = place < 3 and not damage.endswith(b"\n")
        missing = [s for s in (1, 2, 3) if s not in kept]
        assert missing == [place + 1] * joined or not missing
        assert kept[-1] == 6
        aside = folder / f"{metrics.METRICS_FILE}.damaged"
        assert aside.exists() == ("damaged lines were moved" in said.getvalue())
        if place < 3 and b"step" not in damage and damage.strip(b" \t\n\r"):
            assert damage.strip(b" \t\n\r")[:1] in aside.read_bytes()


def test_a_writer_that_cannot_be_opened_is_a_warning_and_the_others_go_on(capsys):
    def failing(folder: Path, step: int) -> Recorder:
        raise OSError("damaged event file")

    after = Recorder()
    writers = Writers([failing, lambda folder, step: after], Path())
    writers.open(0)
    writers.write(1, {"loss": 1.0})
    assert [step for step, _ in after.written] == [1]
    assert "damaged event file" in capsys.readouterr().err


def test_jsonl_keeps_numbers_that_are_not_finite(tmp_path):
    writer = JsonlWriter(tmp_path, 0)
    writer.write(1, {"loss": math.nan, "perplexity": math.inf})
    writer.close()
    JsonlWriter(tmp_path, 1).close()
    (line,) = lines(tmp_path)
    assert math.isnan(line["loss"])
    assert line["perplexity"] == math.inf


def opened(*sinks):
    """The writers of a run whose factories give these."""
    writers = Writers([lambda folder, step, sink=sink: sink for sink in sinks], Path())
    writers.open(0)
    return writers


def test_failing_writer_is_dropped_with_one_warning_and_the_others_go_on(capsys):
    before, failing, after = Recorder(), FailingWrite(), Recorder()
    writers = opened(before, failing, after)
    for step in (1, 2, 3):
        writers.write(step, {"loss": 1.0})
    writers.close()
    assert [step for step, _ in before.written] == [step for step, _ in after.written] == [1, 2, 3]
    assert [step for step, _ in failing.written] == [1]
    assert before.closed
    assert after.closed
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert "FailingWrite" in warnings[0]
    assert "disk full" in warnings[0]


def test_writer_that_fails_to_close_is_a_warning_and_the_others_are_closed(capsys):
    failing, after = FailingClose(), Recorder()
    opened(failing, after).close()
    assert after.closed
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_tensorboard_writes_event_files_into_the_run_folder(tmp_path):
    cfg = config.to_dict(Config(run="runs/mine"))
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    writer = metrics.TensorBoardWriter(tmp_path, 0)
    writer.write(1, {"loss": 2.5, "mfu": 0.5, "epochs/web": 0.1})
    writer.write(1, {"valid_loss": 2.75})
    writer.text(1, "samples", "once upon *a* time")
    writer.close()
    (events,) = (tmp_path / "tensorboard").glob("events*")
    written = events.read_bytes()
    for tag in (b"train/loss", b"speed/mfu", b"epochs/web", b"valid/valid_loss", b"samples"):
        assert tag in written
    assert b"    once upon *a* time" in written
    assert b"configuration" in written
    (hparams,) = (tmp_path / "tensorboard" / "hparams").glob("events*")
    assert b"optim.lr" in hparams.read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unknown_device_has_no_peak_and_no_mfu(dtype):
    throughput = Throughput(lambda seq_len: 1e6, dtype, 0.0, 8)
    assert throughput.of(1000.0, 8) == {"tokens_per_second": 1000.0}
    assert throughput.description.startswith("no peak known")
    assert "log.peak_tflops" in throughput.description


def test_mfu_is_model_flops_over_peak_of_all_devices():
    throughput = Throughput(lambda seq_len: 2e9, "float32", 0.5, 8)
    rate = 100.0
    expected = rate * 2e9 / (jax.device_count() * 0.5e12)
    assert throughput.of(rate, 8)["mfu"] == pytest.approx(expected, rel=1e-12)
    assert f"{jax.device_count()} x 0.5 TFLOP/s" in throughput.description


def test_peaks_of_the_hardware_table_are_for_bfloat16_only(monkeypatch):
    kinds = (jax.devices()[0].device_kind,)
    device = replace(hardware.DEVICES["v7x"], kinds=kinds, tflops=2.0)
    monkeypatch.setitem(hardware.DEVICES, "v7x", device)
    rate = 1000.0
    expected = rate * 1e9 / (jax.device_count() * 2e12)
    assert Throughput(lambda seq_len: 1e9, "bfloat16", 0.0, 8).of(rate, 8)["mfu"] == pytest.approx(
        expected
    )
    assert "mfu" not in Throughput(lambda seq_len: 1e9, "float32", 0.0, 8).of(rate, 8)
    given = Throughput(lambda seq_len: 1e9, "bfloat16", 4.0, 8).of(rate, 8)["mfu"]
    assert given == pytest.approx(expected / 2)  # the configured peak goes before the table


def test_perplexity_is_exp_of_the_loss_and_infinite_beyond_floats():
    assert metrics.perplexity(2.0) == pytest.approx(math.exp(2.0))
    assert metrics.perplexity(1e4) == math.inf


@pytest.mark.slow
def test_prometheus_reads_the_newest_metrics_on_loopback(tmp_path) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    log = LogConfig(metrics_port=port, tensorboard=False)
    writers = metrics.metric_writers(Config(run=str(tmp_path), log=log))
    writers.open(0)
    writers.write(1, {"loss": 5.0})
    writers.write(2, {"loss": 4.5, "valid_loss/web": 3.0})
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    assert "gptjax_loss 4.5" in text
    assert "gptjax_step 2.0" in text
    assert "gptjax_valid_loss_web 3.0" in text
    writers.close()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10)
