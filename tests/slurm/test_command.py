"""``ovr slurm``: its script is that of the source tree but for what the command line changes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ovr_megatron.cli import slurm
from ovr_megatron.errors import UserError
from tests.slurm.cluster import shell_environment

ROOT = Path(__file__).resolve().parents[2]


def options(text: str) -> list[str]:
    return re.findall(r"^#SBATCH (.+)$", text, re.MULTILINE)


def script(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert slurm.main(words) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("stage", "file"), [("sft", "coldstart_64gpu.sh"), ("rl", "rl.sh")])
def test_without_options_it_asks_slurm_for_the_same(stage: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    shipped, made = (ROOT / "slurm" / file).read_text(), script(capsys, stage)
    assert options(made) == options(shipped) and len(options(made)) == 11
    assert made.splitlines()[-1] == shipped.splitlines()[-1]


def test_options_replace_lines_and_others_follow(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config-name", "grpo_7b_8gpu", "--time", "4:00:00", "--warning", "900", "--sbatch=--partition=gpu"]
    made = script(capsys, "rl", *words, "--sbatch=--mem=500G", "run.dir=it's", "--rehearse")
    assert options(made)[1:4] == ["--nodes=1", "--ntasks-per-node=8", "--gpus-per-node=8"]
    assert options(made)[5:8] == ["--mem=500G", "--time=4:00:00", "--signal=B:USR1@900"]
    assert options(made)[-1] == "--partition=gpu" and len(options(made)) == 12
    assert 'export OVR_WARNING_S="${OVR_WARNING_S:-900}"' in made
    assert made.splitlines()[-1] == """launch_stage rl grpo_7b_8gpu 'run.dir=it'"'"'s' only=rehearsal "$@\""""


@pytest.mark.parametrize(
    ("words", "nodes", "per_node"),
    [
        (["sft", "--config-name", "sft_lora_3b_24gb"], 1, 1),
        (["rl", "--config-name", "rl_7b_64gpu", "--gpus-per-node", "4"], 16, 4),
        (["rl", "--nodes", "3"], 3, 8),
    ],
)
def test_nodes_follow_the_recipe(
    words: list[str], nodes: int, per_node: int, capsys: pytest.CaptureFixture[str]
) -> None:
    made = options(script(capsys, *words))
    assert made[1:4] == [f"--nodes={nodes}", f"--ntasks-per-node={per_node}", f"--gpus-per-node={per_node}"]


def test_a_recipe_of_ones_own_is_named_by_its_whole_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("defaults: [schema, _self_]\nsteps: 3\n")
    assert f"\nlaunch_stage coldstart {tmp_path}/mine.yaml " in script(capsys, "sft", "--config-name", "mine.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rl", "run.sede=1"], "no setting run.sede; did you mean run.seed"),
        (["sft", "parallel.tp=0"], "parallel.tp"),
        (["rl", "--config-name", "no_recipe"], "no_recipe is no recipe"),
        (["rl", "--sbatch", "partition=gpu"], "'partition=gpu' is no option of sbatch"),
        (["rl", "--time", "1:00\nrm x"], "is no option of sbatch"),
        (["rl", "--submit"], "there is no run folder; give run.dir=DIR"),
    ],
)
def test_what_cannot_work_is_refused_before_the_queue(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        slurm.main(words)


def test_only_its_own_file_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "job.sh"
    for words in (["rl"], ["sft"]):
        slurm.main([*words, "--write", str(path)])
    assert "launch_stage coldstart " in path.read_text() and path.stat().st_mode & 0o111
    path.write_text("#!/bin/sh\n")
    with pytest.raises(UserError, match="was not written by ovr slurm, so it is left alone"):
        slurm.main(["rl", "--write", str(path)])


def test_bash_runs_it_from_any_folder(tmp_path: Path) -> None:
    """The launcher finds its files and its interpreter, and says what is missing."""
    slurm.main(["sft", "--write", str(tmp_path / "job.sh")])
    result = subprocess.run(
        ["bash", "job.sh"], cwd=tmp_path, env=shell_environment(), capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2 and "give run.dir=DIR as an argument or OVR_RUN=DIR" in result.stderr
    assert f"interpreter={sys.executable}\n" in (tmp_path / "job.sh").read_text()


def test_submit_gives_the_script_to_sbatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A program in sbatch's place keeps what it reads; tests/slurm/test_jobs.py has the real one."""
    (tmp_path / "sbatch").write_text(f"#!/bin/bash\ncat >{tmp_path}/given\nexit 7\n")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert slurm.main(["rl", "run.dir=r", "--submit"]) == 7
    assert (tmp_path / "given").read_text() == script(capsys, "rl", "run.dir=r")
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="sbatch is not on this machine; write the script with --write"):
        slurm.main(["rl", "run.dir=r", "--submit"])
