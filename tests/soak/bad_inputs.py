"""Give every command inputs that cannot work and count what it answers with.

    python tests/soak/bad_inputs.py [--area NAME ...] [--every N] [--only TEXT] [--show] [--out FILE]

A case is one command line with the files that it reads.  The right answer is exit code 2 and a sentence that names what
is wrong; anything else is counted as a traceback, a hang, a wrong acceptance or a wrong sentence.  The commands run as
a user's do, through their own entry points, each in a forked child of a process that has imported the libraries once.
The last lines are a table by area; the exit code is 1 unless every case is refused in the right way.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/soak")]

from bad_input_case import Case  # noqa: E402

from tests.forked import run_to_exit  # noqa: E402

OUTCOMES = ("refused", "traceback", "hang", "accepted", "other")
SECONDS = 120  # of a case; a refusal takes one or two


@dataclass(frozen=True)
class Answer:
    """What a command did: its outcome, exit code, seconds and the end of its output."""

    outcome: str
    code: int
    seconds: float
    text: str


def run(case: Case, sound: dict[str, Path], folder: Path) -> Answer:
    """Write the files of a case, run its command in a child and judge the answer."""
    folder.mkdir(parents=True)
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for edit in case.edits:
        edit(folder, sound)
    names = {"tmp": folder, **sound}
    command = [substitute(word, names) for word in case.command]
    output = folder / "output.txt"
    start = time.monotonic()
    code = run_child(command, folder, output, SECONDS)
    seconds = time.monotonic() - start
    text = output.read_text(errors="replace")
    return Answer(judge(code, text, case.says), code, seconds, text)


def substitute(word: str, names: dict[str, Path]) -> str:
    """Replace ``{name}`` by the path of that name; other braces stay."""
    for name, path in names.items():
        word = word.replace("{" + name + "}", str(path))
    return word


def run_child(command: Sequence[str], folder: Path, output: Path, seconds: float) -> int:
    """Run a command in a forked child and return its exit code; -1 where it was stopped after ``seconds``."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        become(command, folder, output)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            stop_group(child)  # what the command left behind, such as graders
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    stop_group(child)
    os.waitpid(child, 0)
    return -1


def stop_group(leader: int) -> None:
    """Kill what is left of a child's process group."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def become(command: Sequence[str], folder: Path, output: Path) -> NoReturn:
    """Turn this forked child into the command; never returns."""
    os.setpgid(0, 0)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, null), (1, file), (2, file)):
        os.dup2(source, target)
    os.chdir(folder)
    run_to_exit(lambda: run_words(command))


def run_words(command: Sequence[str]) -> None:
    """Run ``-m MODULE ...`` or ``SCRIPT ...`` in this process."""
    if command[0] == "-m":
        sys.argv = list(command[1:])
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [str(ROOT / command[0]), *command[1:]]
        runpy.run_path(sys.argv[0], run_name="__main__")


def judge(code: int, text: str, says: str) -> str:
    """Name the outcome of a command that should have been refused."""
    if code == -1:
        return "hang"
    if "Traceback (most recent call last)" in text:
        return "traceback"
    if code == 0:
        return "accepted"
    return "refused" if code == 2 and says.lower() in text.lower() else "other"


def sound_inputs(folder: Path) -> dict[str, Path]:
    """Make the model, checkpoint, tokenised set and picture that cases refer to."""
    from bad_input_rows import TEXT_ROW
    from PIL import Image

    paths = {name: folder / name for name in ("model", "checkpoint", "set", "rows.jsonl", "picture.png")}
    folder.mkdir(parents=True)
    paths["rows.jsonl"].write_text((json.dumps(TEXT_ROW) + "\n") * 8)
    Image.new("RGB", (56, 56)).save(paths["picture.png"])
    sources = f"data.sources=[{{path: {paths['rows.jsonl']}}}]"
    for command in (
        ("tools/make_tiny_model.py", "--out", str(paths["model"])),
        ("tools/convert_from_hf.py", "--hf", str(paths["model"]), "--out", str(paths["checkpoint"])),
        ("tools/tokenise.py", str(paths["set"]), "--model", str(paths["model"]), sources),
    ):
        output = folder / "output.txt"
        if run_child(command, folder, output, 600) != 0:
            raise RuntimeError(f"{' '.join(command)} failed:\n{output.read_text()}")
    return {name.partition(".")[0]: path for name, path in paths.items()}


def load_libraries() -> None:
    """Import what the commands import, once, so that a forked child starts at once."""
    import ovr_megatron.coldstart.training
    import ovr_megatron.curation.prepare
    import ovr_megatron.evaluation.evaluator
    import ovr_megatron.replay
    import ovr_megatron.rl.training
    import ovr_megatron.verify  # noqa: F401


def all_cases() -> Iterator[Case]:
    """Yield the cases of every table."""
    import bad_input_files
    import bad_input_rows
    import bad_input_settings

    yield from bad_input_settings.cases()
    yield from bad_input_rows.cases()
    yield from bad_input_files.cases()


def choose(cases: list[Case], every: int) -> list[Case]:
    """Return every ``every``-th case of each area, the first of each among them."""
    places: Counter[str] = Counter()
    chosen = []
    for case in cases:
        if places[case.area] % every == 0:
            chosen.append(case)
        places[case.area] += 1
    return chosen


def main() -> None:
    """Run the chosen cases, print those that are not refused, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--area", nargs="*", help="only these areas")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every N-th case of an area (default: all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name or command has this text")
    parser.add_argument("--show", action="store_true", help="print the sentence of each case")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON Lines: area, name and answer of each case")
    args = parser.parse_args()
    cases = [case for case in all_cases() if not args.area or case.area in args.area]
    cases = choose([case for case in cases if args.only in f"{case.name} {' '.join(case.command)}"], args.every)
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    load_libraries()
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    work = Path(tempfile.mkdtemp(prefix="bad_inputs_"))
    try:
        sound = sound_inputs(work / "sound")
        for number, case in enumerate(cases):
            answer = run(case, sound, work / "case")
            counts[case.area][answer.outcome] += 1
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps({"area": case.area, "name": case.name, **asdict(answer)}) + "\n")
            if args.show or answer.outcome != "refused":
                place = f"{answer.outcome:9} {number:3} {case.area}: {case.name}"
                print(f"{place} (code {answer.code}, {answer.seconds:.1f} s)")
                print("".join(f"          | {line}\n" for line in answer.text.splitlines()[-6:]), end="", flush=True)
            shutil.rmtree(work / "case")
    finally:
        shutil.rmtree(work)
    print(table(counts))
    sys.exit(0 if all(set(row) == {"refused"} for row in counts.values()) else 1)


def table(counts: dict[str, Counter[str]]) -> str:
    """Return the outcomes by area as a table, the sums last."""
    total: Counter[str] = sum(counts.values(), Counter())
    lines = [f"{'area':16}{'cases':>8}" + "".join(f"{name:>11}" for name in OUTCOMES)]
    for area, row in [*counts.items(), ("all", total)]:
        lines.append(f"{area:16}{sum(row.values()):8}" + "".join(f"{row[name]:11}" for name in OUTCOMES))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
