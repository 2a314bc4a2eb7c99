"""Faults and logged reads in a process of gptjax, as environment variables say.

IDS_FOLDER: folder for a log of each read of training windows, with its step and window ids.
FAULT=sleep:3:1 or raise:3:1: process 1 sleeps, or raises, while reading the batch of step 3.
FAULT=restore:40:1: process 1 takes 40 s longer to look for a checkpoint.
FAULT=prepare:0:0: process 0 takes an hour to prepare the text, and says so.
FAULT=flip:5:1: at step 5, process 1 has a bit of the second result of an audited step wrong.
FAULT=device:2:1: the device of process 1 is found to be twice as slow, each time after 2 s.
FAULT=slow:0:0: each read takes half a second longer, so that a test has time to act on the run.
"""

import json
import os
import sys
import time
from pathlib import Path

import jax
from flipped import with_flip

from gptjax.checkpoint.checkpointer import Checkpointer
from gptjax.data import loader, prepare
from gptjax.training import audit, stragglers


def stuck_in_a_read() -> None:
    time.sleep(3600)


def install() -> None:
    """Puts them into this process."""
    restore_newest = Checkpointer.restore_newest
    read = loader.TrainData._read
    tokenize = prepare._tokenize
    process = os.environ.get("JAX_PROCESS_ID", "0")
    kind, step_at, process_at = os.environ.get("FAULT", "none:0:0").split(":")

    def logged_read(self, steps, rows):
        for step in steps:
            if folder := os.environ.get("IDS_FOLDER"):
                line = {"step": step + 1, "ids": self.order.places(step, rows)[1].tolist()}
                with (Path(folder) / f"{process}.{os.getpid()}.jsonl").open("a") as notes:
                    notes.write(json.dumps(line) + "\n")
            if kind == "slow":
                time.sleep(0.5)
            if step + 1 == int(step_at) and process == process_at:
                if kind == "sleep":
                    stuck_in_a_read()
                elif kind == "raise":
                    raise ZeroDivisionError("injected")
        return read(self, steps, rows)

    def slow_restore(*args, **options):
        if kind == "restore" and process == process_at:
            time.sleep(int(step_at))
        return restore_newest(*args, **options)

    def slow_tokenize(*args, **options):
        if kind == "prepare" and process == process_at:
            print("preparing", file=sys.stderr, flush=True)
            time.sleep(3600)
        return tokenize(*args, **options)

    def audited(step_fn, state, batch, step, run):
        def flipping(state, batch):
            flipping.calls += 1
            new, found = step_fn(state, batch)
            if flipping.calls == 2:
                new.params["embed"] = with_flip(new.params["embed"], jax.local_devices()[0].id)
            return new, found

        flipping.calls = 0
        at = kind == "flip" and process == process_at and step == int(step_at)
        return audited_before(flipping if at else step_fn, state, batch, step, run)

    def slow_device(device):
        seconds = seconds_of(device)
        if kind != "device":
            return seconds
        time.sleep(int(step_at) * (process == process_at))
        return 2.0 if process == process_at else 1.0

    audited_before, audit.audited = audit.audited, audited
    seconds_of, stragglers._seconds_of = stragglers._seconds_of, slow_device
    prepare._tokenize = slow_tokenize
    loader.TrainData._read = logged_read
    Checkpointer.restore_newest = slow_restore
