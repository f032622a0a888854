"""A command that takes known memory in its children, is measured."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "measure.py"
MIB = 2**20
# A parent with two children that hold `each` MiB of their own for `seconds`.
HOLD = """
import subprocess, sys
child = "import sys, time; held = b'x' * (int(sys.argv[1]) << 20); time.sleep({s})"
children = [subprocess.Popen([sys.executable, "-c", child, sys.argv[1]]) for _ in range(2)]
[child.wait() for child in children]
"""


def measure(tmp_path, *arguments, timeout=60):
    out = tmp_path / "measured" / "x.json"
    command = [sys.executable, str(TOOL), "--out", str(out), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    return result, json.loads(out.read_text()) if out.exists() else None


def test_memory_of_children_is_summed_and_shared_pages_are_not_doubled(tmp_path):
    result, found = measure(tmp_path, "--every", 0.1, "--", sys.executable, "-c", HOLD.format(s=1.2), 60)
    assert result.returncode == 0, result.stderr
    assert 120 * MIB < found["peak_memory_bytes"] < 190 * MIB
    assert 1.2 < found["wall_seconds"] < 20


def test_exit_status_and_output_are_the_commands(tmp_path):
    script = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)"
    result, found = measure(tmp_path, sys.executable, "-c", script)
    assert (result.returncode, result.stdout, result.stderr) == (7, "out\n", "err\n")
    assert set(found) == {"wall_seconds", "peak_memory_bytes"}


def test_a_killed_command_leaves_as_in_a_shell(tmp_path):
    result, found = measure(tmp_path, sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")
    assert result.returncode == 128 + signal.SIGKILL
    assert found["wall_seconds"] > 0


def test_arguments_of_the_command_are_its_own(tmp_path):
    result, _ = measure(tmp_path, sys.executable, "-c", "import sys; print(sys.argv[1:])", "--out", "here", "--add")
    assert result.stdout == "['--out', 'here', '--add']\n"


def test_continued_commands_add_up(tmp_path):
    sleep = [sys.executable, "-c", "import time; time.sleep(0.3)"]
    _, first = measure(tmp_path, "--every", 0.05, *sleep)
    _, second = measure(tmp_path, "--every", 0.05, "--add", *sleep)
    assert second["wall_seconds"] > first["wall_seconds"] + 0.3
    assert second["peak_memory_bytes"] >= first["peak_memory_bytes"] > MIB
    _, third = measure(tmp_path, *sleep)
    assert third["wall_seconds"] < second["wall_seconds"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_command_may_end_in_its_own_way(tmp_path, number):
    script = (
        "import signal, sys, time\n"
        "for n in (2, 15): signal.signal(n, lambda n, f: (print('saved', flush=True), sys.exit(3)))\n"
        "print('ready', flush=True); time.sleep(30)"
    )
    out = tmp_path / "x.json"
    command = [sys.executable, str(TOOL), "--out", str(out), sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        if number == signal.SIGINT:  # a terminal sends it to all processes in the foreground
            subprocess.run(["kill", "-INT", "--", f"-{process.pid}"], check=True)
        else:
            process.terminate()
        assert process.stdout.read() == "saved\n"
        assert process.wait(timeout=20) == 3
    assert json.loads(out.read_text())["wall_seconds"] < 25


def test_a_command_that_does_not_exist_is_named(tmp_path):
    result, found = measure(tmp_path, "no-such-command")
    assert result.returncode == 127
    assert "no-such-command: No such file" in result.stderr
    assert found is None
    assert measure(tmp_path)[0].returncode == 2
