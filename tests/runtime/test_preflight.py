"""Checks of the pre-flight that need one process; tests/slurm has those of several."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ovr_megatron.cli import preflight as command
from ovr_megatron.launch import compose
from ovr_megatron.preflight import check_layers
from ovr_megatron.runtime import preflight
from ovr_megatron.runtime.preflight import Facts

ROOT = Path(__file__).resolve().parents[2]

SAME = Facts("n1", {"torch": "2.13.0", "vllm": "0.32.0"}, "abc", "1234", {"/data/rows.jsonl": 100})


def test_equal_nodes_have_no_differences() -> None:
    assert preflight.differences([SAME, SAME, replace(SAME, host="n2")]) == []


def test_each_difference_names_the_odd_node() -> None:
    others = [replace(SAME, host=f"n{number}") for number in (2, 3)]
    odd = Facts("n4", {"torch": "2.11.0"}, "def", "5678", {"/data/rows.jsonl": 90})
    assert preflight.differences([SAME, *others, odd]) == [
        "n4: torch is 2.11.0, on the other nodes 2.13.0",
        "n4: vllm is not installed, on the other nodes 0.32.0",
        "n4: the code differs (commit 5678, on the other nodes 1234)",
        "n4: /data/rows.jsonl has size 90, on the other nodes 100",
    ]


def test_facts_are_those_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    facts = preflight.gather_facts([tmp_path, tmp_path / "rows.jsonl", tmp_path / "absent"])
    assert facts.files == {str(tmp_path): 1, str(tmp_path / "rows.jsonl"): 3}
    assert facts.packages["torch"].startswith("2.")
    assert facts == preflight.gather_facts([tmp_path, tmp_path / "rows.jsonl"])


def test_unreadable_inputs(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "rows").write_text("{}\n")
    assert preflight.check_readable(tmp_path / "rows") == []
    (problem,) = preflight.check_readable(tmp_path / "absent")
    assert problem.startswith(f"{tmp_path / 'absent'} cannot be read (No such file or directory); copy it to a file ")
    assert preflight.check_readable(tmp_path / "empty") == [f"{tmp_path / 'empty'} is empty"]
    assert preflight.check_readable(tmp_path / "folder") == [f"{tmp_path / 'folder'} is an empty folder"]


def test_space(tmp_path: Path) -> None:
    assert preflight.check_space(tmp_path, 1) == []
    (problem,) = preflight.check_space(tmp_path, 10**18)
    assert "GB free, and the run's checkpoints take 1000000000.0 GB; free some, or lower run.keep_last" in problem


def test_write_rate_leaves_nothing(tmp_path: Path) -> None:
    assert preflight.write_rate(tmp_path, 2) > 0
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NotADirectoryError):
        preflight.write_rate(Path(os.devnull), 1)


def test_two_cudnns_in_a_process_are_refused(tmp_path: Path) -> None:
    """Two libraries of that name are loaded in earnest: copies of one of Python's own."""
    import _ctypes

    script = "import ctypes, sys\nfor path in sys.argv[1:]: ctypes.CDLL(path)\n"
    script += "from ovr_megatron.runtime.preflight import check_cudnn\nprint(check_cudnn())"
    paths = [tmp_path / folder / "libcudnn.so.9" for folder in ("system", "wheel")]
    for path in paths:
        path.parent.mkdir()
        shutil.copy(_ctypes.__file__, path)
    one, two = (
        subprocess.run([sys.executable, "-c", script, *given], capture_output=True, text=True).stdout
        for given in (paths[:1], paths)
    )
    assert one == "[]\n"
    assert f"two cuDNN libraries are loaded, from {tmp_path}/system and {tmp_path}/wheel" in two


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is no CPU build")
def test_a_cpu_build_of_torch_is_named_with_its_remedy() -> None:
    (problem,) = preflight.check_gpus(0, 8)
    assert problem.startswith(f"torch {torch.__version__} is a CPU build; install the GPU build with `bash ")
    assert "examples/install.sh --gpu`" in problem and "OVR_GPUS=0" in problem


def test_the_container_has_one_cudnn() -> None:
    lines = (ROOT / "docker/Dockerfile").read_text().splitlines()
    (base,) = (line for line in lines if line.startswith("FROM "))
    assert "cudnn" not in base and "ENV CUDNN_PATH=/opt/venv/lib/python3.12/site-packages/nvidia/cudnn" in lines


def test_a_gpu_without_transformer_engine_is_refused_unless_it_is_said() -> None:
    """Here it is not installed, either."""
    for layers, problems in (("auto", 1), ("local", 0)):
        found = check_layers(compose("rl_7b_64gpu", [f"model.layers={layers}"]))
        assert len(found) == problems
        assert all("Transformer Engine" in told and "model.layers=local" in told for told in found), found


def test_a_rehearsal_is_read_as_the_stage_reads_it(capsys: pytest.CaptureFixture) -> None:
    """It gets as far as what is missing."""
    assert command.main(["rl", "--rehearse", "--config-name", "rl_7b_64gpu"]) == 2
    assert "no value for model.path, run.dir" in capsys.readouterr().out


def test_the_cold_start_has_the_name_of_its_command_and_of_its_module(capsys: pytest.CaptureFixture) -> None:
    answers = []
    for stage in ("sft", "coldstart"):
        assert command.main([stage]) == 2
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] and "no value for model.path, run.dir" in answers[0]
