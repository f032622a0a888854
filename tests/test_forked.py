"""Forks in the place of an interpreter: arguments, streams, exit codes, signals and what outlives whom."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

WAITING = """
import os, pathlib, signal, sys, time
def leave(number, frame):
    print("signal", number)
    sys.exit(75)
signal.signal(signal.SIGTERM, leave)
pathlib.Path("pid").write_text(str(os.getpid()))
time.sleep(60)
"""


def begin(python: Path, folder: Path) -> tuple[subprocess.Popen[str], int]:
    """Run a script that waits; return its process and the number of the fork."""
    (folder / "wait.py").write_text(WAITING)
    process = subprocess.Popen([python, "wait.py"], cwd=folder, stdout=subprocess.PIPE, text=True)
    while not (folder / "pid").exists() or not (folder / "pid").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    return process, int((folder / "pid").read_text())


@pytest.mark.parametrize("end", ["3", "'a sentence'", "None"])
def test_arguments_streams_and_the_exit_code_are_a_commands(loaded_python: Path, tmp_path: Path, end: str) -> None:
    text = f"import os, sys\nprint(sys.argv[1:], os.environ['WORD'], input(), os.getcwd())\nsys.exit({end})\n"
    (tmp_path / "script.py").write_text(text)
    command = [loaded_python, tmp_path / "script.py", "a b", "c"]
    result = subprocess.run(
        command, input="line\n", cwd=tmp_path, env=os.environ | {"WORD": "word"}, capture_output=True, text=True
    )
    assert result.stdout == f"['a b', 'c'] word line {tmp_path}\n"
    assert (result.returncode, result.stderr) == {
        "3": (3, ""),
        "'a sentence'": (1, "a sentence\n"),
        "None": (0, ""),
    }[end]


def test_a_signal_reaches_the_fork(loaded_python: Path, tmp_path: Path) -> None:
    process, _ = begin(loaded_python, tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == f"signal {signal.SIGTERM:d}\n"
    assert process.returncode == 75


def test_a_fork_that_a_signal_ends_ends_its_command_by_it(loaded_python: Path, tmp_path: Path) -> None:
    process, fork = begin(loaded_python, tmp_path)
    os.kill(fork, signal.SIGKILL)
    assert process.wait(20) == -signal.SIGKILL


def test_a_command_that_is_killed_takes_its_fork_along(loaded_python: Path, tmp_path: Path) -> None:
    process, fork = begin(loaded_python, tmp_path)
    process.kill()
    process.communicate(timeout=20)  # until the fork's end of the pipe is closed
    deadline = time.monotonic() + 20
    while Path(f"/proc/{fork}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_words_of_the_interpreter_itself_are_left_to_it(loaded_python: Path) -> None:
    result = subprocess.run(
        [loaded_python, "-I", "-c", "import sys; print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert result.stdout == "False\n"
