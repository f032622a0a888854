"""The wheel without a source tree: its commands, recipes and scripts, and the first run of docs/install.md."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = Path(sysconfig.get_path("purelib"))
SOURCES = ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md")
FOLDERS = ("benchmarks", "docker", "docs", "examples", "ovr_megatron", "slurm", "tests", "tools")

# In every interpreter of the environment: files of the source tree that it opens.
WITNESS = f"""
import os, sys
root, others = {str(ROOT)!r} + os.sep, os.path.realpath({sys.prefix!r}) + os.sep
def note(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        path = os.path.abspath(arguments[0])
        if path.startswith(root) and not os.path.realpath(path).startswith(others):
            descriptor = os.open(os.environ["OPENED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(descriptor, (path + "\\n").encode())
            os.close(descriptor)
if "OPENED" in os.environ:
    sys.addaudithook(note)
"""


def files(folder: Path) -> set[str]:
    """Paths of a package's files below ``folder``, links followed."""
    found = (Path(parent) / name for parent, _, names in os.walk(folder, followlinks=True) for name in names)
    return {str(path.relative_to(folder)) for path in found if path.suffix != ".pyc"}


@dataclass(frozen=True)
class Built:
    sdist: Path
    wheel: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """What ``python -m build`` makes: the sdist of the tree, and the wheel of the sdist."""
    tree, dist = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        shutil.copy(ROOT / name, tree)
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    quiet = {"check": True, "capture_output": True, "timeout": 120}
    subprocess.run([sys.executable, "-c", build, str(dist)], cwd=tree, **quiet)
    (sdist,) = dist.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "-w", str(dist), str(sdist)], cwd=dist, **quiet)
    (wheel,) = dist.glob("*.whl")
    return Built(sdist, wheel)


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel and the other packages of this one; an empty folder; what is noted of it."""

    environment: Path
    folder: Path
    opened: Path

    def run(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment in the empty folder."""
        foreign = ("PYTHON", "OVR_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_")
        variables = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        variables |= {"OPENED": str(self.opened), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}
        command = [str(self.environment / "bin" / words[0]), *words[1:]]
        return subprocess.run(command, cwd=self.folder, env=variables, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, symlinks=True, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install", "--no-deps"]
    # Without PYTHONPATH, in which pip would see this tree as an installation.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [*pip, "--no-index", "--no-compile", str(built.wheel)]
    subprocess.run(command, env=variables, check=True, capture_output=True, timeout=120)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "witness.py").write_text(WITNESS)
    # A path in such a file is not searched for others of its kind: the editable installation of this tree is not seen.
    (site / "packages.pth").write_text(f"import witness\n{PACKAGES}\n")
    return Installed(environment, tmp_path_factory.mktemp("empty"), tmp_path_factory.mktemp("noted") / "opened")


def test_sdist_and_wheel_have_every_file_of_the_package(built: Built) -> None:
    package = {f"ovr_megatron/{path}" for path in files(ROOT / "ovr_megatron")}
    assert {"ovr_megatron/slurm/launch.sh", "ovr_megatron/recipes/tiny_rl.yaml", "ovr_megatron/py.typed"} <= package
    with zipfile.ZipFile(built.wheel) as wheel:
        assert {name for name in wheel.namelist() if not name.startswith("ovr_megatron-")} == package
        for name in ("launch.sh", "rank.sh", "rl.sh", "coldstart_64gpu.sh"):
            assert wheel.read(f"ovr_megatron/slurm/{name}") == (ROOT / "slurm" / name).read_bytes()
    with tarfile.open(built.sdist) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    missing = {f"{folder}/{path}" for folder in FOLDERS for path in files(ROOT / folder)} | set(SOURCES)
    assert {name for name in missing - names if "/." not in name} == set()


def test_a_file_of_the_source_tree_would_be_noted(installed: Installed, tmp_path: Path) -> None:
    read = f"open({str(ROOT / 'setup.cfg')!r}), open({str(PACKAGES / 'numpy/__init__.py')!r})"
    assert installed.run("python", "-c", read, OPENED=str(tmp_path / "opened")).returncode == 0
    assert (tmp_path / "opened").read_text() == f"{ROOT}/setup.cfg\n"


def test_commands_start_from_an_empty_folder(installed: Installed) -> None:
    listed = installed.run("ovr", "--help")
    assert listed.returncode == 0 and "\n  slurm " in listed.stdout, listed.stderr
    script = installed.run("ovr", "slurm", "rl", "run.dir=r")
    assert script.returncode == 0, script.stderr
    assert f"interpreter={installed.environment}/bin/python\n" in script.stdout
    (launcher,) = re.findall(r"^source (.+)$", script.stdout, re.MULTILINE)
    assert Path(launcher).is_relative_to(installed.environment) and Path(launcher).exists()
    assert "root=" not in script.stdout


def test_the_first_run_of_the_documentation(installed: Installed) -> None:
    page = (ROOT / "docs/install.md").read_text().split("\n### A first run\n")[1].split("\n## ")[0]
    modules = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    names = re.findall(r"`(\w+\.py)` ", page.split("```sh")[0])
    for name, text in zip(names, modules, strict=True):
        (installed.folder / name).write_text(text)
    (installed.folder / "script.sh").write_text(page.split("```sh\n")[1].split("```")[0])
    runner = shutil.copy(ROOT / "tests/wheel_commands.py", installed.folder)
    # The engine stays in its process, which has the imports already.
    result = installed.run("python", str(runner), "script.sh", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    print(result.stdout)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    records = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert Path(records[0]["package"]).is_relative_to(installed.environment)
    assert [record["words"][1] for record in records[1:]] == [
        *("rows.py", "tiny-model", "sft", "rl", "convert", "load.py", "slurm")
    ]
    responses = [json.loads(line) for line in (installed.folder / "grpo/rollouts/000000.jsonl").open()]
    assert len(responses) == 16
    for row in responses:  # the function of the page, by hand
        boxed = 1.0 if f"\\boxed{{{row['answer']}}}" in row["response"] else 0.2
        assert row["reward"] == (boxed if row["stopped"] and "\\boxed{" in row["response"] else 0.0), row
    by_transformers, by_vllm = re.findall(r"^(?:Transformers|vLLM): (.*)$", result.stdout, re.MULTILINE)
    assert by_transformers == by_vllm and "\\boxed{" in by_vllm
    assert (installed.folder / "job.sh").exists()
    assert not installed.opened.exists(), installed.opened.read_text()
