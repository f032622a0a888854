"""How commands end: with a sentence and a code, never with a traceback of a user's mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ovr_megatron.config import ConfigError
from ovr_megatron.runtime.command import run_command

ROOT = Path(__file__).resolve().parents[2]


def fail():
    raise ConfigError("run.seed=x is no number")


def test_a_mistake_is_one_sentence_and_code_2(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit, match="2"):
        run_command(fail)
    assert capsys.readouterr().err == "error: run.seed=x is no number\n"
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == "run.seed=x is no number"


def test_a_file_in_the_place_of_a_folder_is_one_sentence(capsys, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/folder"):
        with pytest.raises(SystemExit, match="2"):
            run_command(path.mkdir)
        assert f"'{path}'; give another path" in capsys.readouterr().err


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


def test_a_reader_that_has_enough_ends_a_command_silently():
    # A writer that outlives its reader: `head` has left before the second line comes.
    slow = (
        "import time\nfrom ovr_megatron.runtime.command import run_command\n"
        "def main():\n    print('one', flush=True)\n    time.sleep(0.5)\n    print('two')\n    return 0\n"
        "run_command(main)"
    )
    command = f'{sys.executable} -c "{slow}" | head -n 1; exit ${{PIPESTATUS[0]}}'
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (result.stdout, result.stderr, result.returncode) == ("one\n", "", 141)


def test_ranks_that_find_the_same_mistake_tell_it_once():
    command = [sys.executable, "-m", "ovr_megatron.torchrun", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "ovr_megatron.coldstart", "run.sed=3"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    lines = [line for line in result.stderr.splitlines() if "OMP_NUM_THREADS" not in line and set(line) != {"*"}]
    assert lines == ["error: there is no setting run.sed; did you mean run.seed?"]
    assert result.returncode == 2
