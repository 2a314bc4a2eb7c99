"""How the command's process ends."""

import subprocess
import sys

COMMAND = """
import atexit, threading, time
from gptjax import __main__ as command

class Finalized:
    def __del__(self):
        print("finalized")

kept = Finalized()

def main():
    print("main")
    atexit.register(print, "at exit")
    threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    return 3

command.main = main
command.run()
"""


def test_the_process_ends_before_the_interpreter_ends_daemon_threads() -> None:
    done = subprocess.run([sys.executable, "-c", COMMAND], capture_output=True, text=True)
    # Other threads and exit handlers are waited for; nothing is finalized.
    assert (done.returncode, done.stdout.split("\n")) == (3, ["main", "thread", "at exit", ""])


def test_an_exception_keeps_its_traceback() -> None:
    code = COMMAND.replace("return 3", "raise ValueError('of main')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: of main\n")
