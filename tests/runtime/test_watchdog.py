"""Processes that stand still end by themselves; those that make progress do not."""

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
START = """
import ctypes, sys, time
from pathlib import Path
from ovr_megatron.runtime import watchdog
with watchdog.Watchdog(Path(sys.argv[1]), {limit}):
"""


def run(folder: Path, limit: float, *body: str) -> subprocess.CompletedProcess[str]:
    script = START.format(limit=limit) + "".join(f"    {line}\n" for line in body)
    command = [sys.executable, "-c", script, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_process_that_stands_still_says_where_and_ends(tmp_path: Path) -> None:
    result = run(tmp_path, 0.5, "time.sleep(30)")
    stacks = tmp_path / "logs/stacks_rank_0.txt"
    assert result.returncode == 1
    assert result.stderr.startswith("hang: rank 0 on ")
    assert f"run.hang_timeout_s=0.5 s, at <string>:6 (<module>); its stacks are in {stacks}; it" in result.stderr
    assert 'File "<string>", line 6 in <module>' in stacks.read_text()


def test_progress_begins_the_limit_anew(tmp_path: Path) -> None:
    result = run(tmp_path, 0.5, "for _ in range(15):", "    time.sleep(0.1)", "    watchdog.touch()", "print('done')")
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")
    assert not list(tmp_path.iterdir()), "nothing is written unless it hangs"


def test_a_rank_that_waits_writes_its_stacks_when_another_ends(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "stacks_rank_1.txt").write_text("of an earlier launch\n")
    appended = f"open({str(logs / 'stacks_rank_1.txt')!r}, 'a').write('of this launch')"
    quiet = run(tmp_path, 2.5, "time.sleep(1)")
    assert (quiet.returncode, [path.name for path in logs.iterdir()]) == (0, ["stacks_rank_1.txt"])
    # One line writes and waits, for the file may be seen before the next line begins.
    result = run(tmp_path, 2.5, "time.sleep(0.2)", f"{appended}; time.sleep(1)")
    assert (result.returncode, result.stderr) == (0, ""), "it has made progress, so it does not end by itself"
    assert 'File "<string>", line 7 in <module>' in (logs / "stacks_rank_0.txt").read_text()


def test_a_rank_that_hangs_after_another_has_its_stacks_once(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    appended = f"open({str(logs / 'stacks_rank_1.txt')!r}, 'a').write('of this launch')"
    result = run(tmp_path, 1, "time.sleep(0.2)", appended, "time.sleep(30)")
    assert result.returncode == 1 and f"its stacks are in {logs / 'stacks_rank_0.txt'}; it" in result.stderr
    assert (logs / "stacks_rank_0.txt").read_text().count("run.hang_timeout_s=1\n") == 1


def test_a_rank_that_hangs_stays_until_the_others_have_written_their_stacks(tmp_path: Path) -> None:
    began = time.monotonic()
    assert run(tmp_path, 5, "time.sleep(30)").returncode == 1
    assert time.monotonic() - began > 5 + 1


def test_a_library_that_keeps_the_interpreters_lock_is_ended_too(tmp_path: Path) -> None:
    began = time.monotonic()
    result = run(tmp_path, 0.5, "ctypes.PyDLL(None).sleep(40)")
    assert result.returncode == 1 and time.monotonic() - began < 30
    assert "Timeout (0:00:01" in result.stderr and 'File "<string>", line 6 in <module>' in result.stderr


def test_stacks_that_cannot_be_written_do_not_keep_it_alive(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("in the way")
    result = run(tmp_path, 0.5, "time.sleep(30)")
    assert result.returncode == 1 and "its stacks could not be written to " in result.stderr


def test_without_a_limit_nothing_ends(tmp_path: Path) -> None:
    assert run(tmp_path, 0, "time.sleep(0.2)", "watchdog.touch()").returncode == 0
    assert run(tmp_path, 0.2, "pass", "time.sleep(0)").returncode == 0
