"""Environment settings of a rank: who gets them, what is left alone, and that the documentation shows them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ovr_megatron.runtime import environment
from ovr_megatron.runtime.environment import SETTINGS, apply, cache_root, table

ROOT = Path(__file__).resolve().parents[2]


def rank(tmp_path: Path, **others: str) -> dict[str, str]:
    return {
        "RANK": "9",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "8",
        "OVR_CACHE": str(tmp_path),
        **others,
    }


def test_documentation_shows_the_table() -> None:
    assert table() in (ROOT / "docs/slurm.md").read_text()


def test_a_process_that_no_launcher_started_is_left_alone() -> None:
    environment = {"HOME": "/"}
    assert apply(environment) == {}
    assert environment == {"HOME": "/"}


def test_what_the_user_has_set_stays(tmp_path: Path) -> None:
    own = {setting.name: "mine" for setting in SETTINGS}
    environment = rank(tmp_path, OVR_INTERFACE="ib0", OVR_HCA="mlx5_0", OVR_STAGE="coldstart", **own)
    assert apply(environment) == {}
    assert {name: environment[name] for name in own} == own


def test_settings_follow_the_cluster(tmp_path: Path) -> None:
    added = apply(rank(tmp_path, OVR_INTERFACE="=ib0", OVR_HCA="mlx5_0,mlx5_1"))
    assert added["NCCL_SOCKET_IFNAME"] == "=ib0" and added["GLOO_SOCKET_IFNAME"] == "ib0"
    assert added["NCCL_IB_HCA"] == "mlx5_0,mlx5_1"
    assert added["CUDA_DEVICE_MAX_CONNECTIONS"] == "1" and added["HF_HUB_OFFLINE"] == "1"
    assert added["OMP_NUM_THREADS"] == str(max(1, min(8, len(os.sched_getaffinity(0)) // 8)))
    assert added["TRITON_CACHE_DIR"] == f"{tmp_path}/rank_1/triton"
    assert {"NCCL_SOCKET_IFNAME", "NCCL_IB_HCA"}.isdisjoint(apply(rank(tmp_path)))
    assert "HF_HUB_OFFLINE" not in apply(rank(tmp_path, WORLD_SIZE="8"))


def test_expandable_segments_only_where_no_vllm_sleeps(tmp_path: Path) -> None:
    assert apply(rank(tmp_path, OVR_STAGE="coldstart"))["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in apply(rank(tmp_path, OVR_STAGE="rl"))


def test_srun_names_the_rank(tmp_path: Path) -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"}
    environment = {**step, "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "OVR_CACHE": str(tmp_path)}
    apply(environment)
    assert [environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == [
        "9",
        "16",
        "1",
        "8",
    ]
    shell = {"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}
    shell |= {
        "OVR_CACHE": str(tmp_path),
        "SLURM_STEP_NUM_TASKS": "1",
        "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_STEP_TASKS_PER_NODE": "1",
    }
    apply(shell)
    assert (shell["WORLD_SIZE"], shell["LOCAL_WORLD_SIZE"]) == ("1", "1"), "a shell inside an allocation is one task"
    for node, count in enumerate(("8", "8", "4")):
        uneven = {**step, "SLURM_STEP_TASKS_PER_NODE": "8(x2),4", "SLURM_NODEID": str(node)}
        apply(uneven)
        assert uneven["LOCAL_WORLD_SIZE"] == count
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}  # the script of a job is no rank
    assert apply(batch) == {} and "RANK" not in batch


def test_every_cache_of_compiled_kernels_is_the_ranks_own(tmp_path: Path) -> None:
    added = apply(rank(tmp_path))
    caches = {name: value for name, value in added.items() if "CACHE" in name or "WORKSPACE" in name}
    assert caches.keys() == {
        *("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT", "FLASHINFER_WORKSPACE_BASE")
    }
    assert all(value.startswith(f"{tmp_path}/rank_1/") for value in caches.values())
    assert len(set(caches.values())) == 4


def test_transformer_engine_is_sent_to_the_cudnn_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_CUDNN", tmp_path / "nvidia/cudnn")
    assert "CUDNN_PATH" not in apply(rank(tmp_path))
    (tmp_path / "nvidia/cudnn").mkdir(parents=True)
    assert apply(rank(tmp_path))["CUDNN_PATH"] == f"{tmp_path}/nvidia/cudnn"
    assert "CUDNN_PATH" not in apply(rank(tmp_path, CUDNN_PATH="/opt/cudnn"))


def test_transformer_engine_finds_every_library_of_cudnn(tmp_path: Path) -> None:
    """A library that needs ``libcudnn_graph.so.9`` and does not say where it is, as Transformer Engine's compiled part.

    A package of its name that loads such a library is imported with and without this project's package before it.
    """
    cudnn, package = tmp_path / "cudnn/lib", tmp_path / "packages/transformer_engine"
    for folder in (cudnn, package):
        folder.mkdir(parents=True)
    (tmp_path / "graph.c").write_text("int graph(void) { return 7; }")
    (tmp_path / "compiled.c").write_text("int graph(void); int compiled(void) { return graph(); }")
    graph, compiled = cudnn / "libcudnn_graph.so.9", package / "compiled.so"
    flags = ["-shared", "-fPIC"]
    subprocess.run(["gcc", *flags, f"-Wl,-soname,{graph.name}", "-o", graph, tmp_path / "graph.c"], check=True)
    subprocess.run(["gcc", *flags, "-o", compiled, tmp_path / "compiled.c", graph], check=True)
    (package / "__init__.py").write_text(f"import ctypes\nprint(ctypes.CDLL({str(compiled)!r}).compiled())\n")
    search_path = os.pathsep.join([str(tmp_path / "packages"), str(ROOT)])
    variables = os.environ | {"PYTHONPATH": search_path, "CUDNN_PATH": str(cudnn.parent)}
    variables.pop("LD_LIBRARY_PATH", None)
    script = "import transformer_engine"
    alone, after_ours = (
        subprocess.run([sys.executable, "-c", text], env=variables, capture_output=True, text=True)
        for text in (script, f"import ovr_megatron; {script}")
    )
    assert "libcudnn_graph.so.9: cannot open shared object file" in alone.stderr
    assert after_ours.stdout == "7\n", after_ours.stderr


def test_cache_of_another_user_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives a folder away")
    os.chown(tmp_path, 12345, 12345)
    with pytest.raises(PermissionError, match="belongs to another user; name a folder of your own with OVR_CACHE"):
        cache_root({"OVR_CACHE": str(tmp_path)})


def test_set_before_torch_is_imported(tmp_path: Path) -> None:
    script = "import os, sys, ovr_megatron; print(os.environ['CUDA_DEVICE_MAX_CONNECTIONS'], 'torch' in sys.modules)"
    environment = {**os.environ, **rank(tmp_path)}
    environment.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout == "1 False\n", result.stderr
