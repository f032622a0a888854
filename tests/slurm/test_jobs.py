"""Both stages as jobs of a real Slurm.

The cold start is preempted, then robbed of a node; PPO comes to its time limit in an iteration that is longer than the
warning: they end as the undisturbed runs.  A job one of whose ranks never starts ends with a sentence.
"""

import json
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from ovr_megatron.cli import slurm
from ovr_megatron.model.tiny import make_tiny_model
from tests.ranks import launch
from tests.slurm.cluster import Cluster, missing, shell_environment

ROOT = Path(__file__).resolve().parents[2]
COLD_START, RL = ROOT / "slurm/coldstart_64gpu.sh", ROOT / "slurm/rl.sh"
STEPS, EVERY = 60, 10
CLOCKS = ("timing/", "perf/", "memory/")
LIMIT_S = float(os.environ.get("SLURM_TEST_LIMIT_S", "240"))

LACK = missing()
pytestmark = [pytest.mark.both_cores, pytest.mark.skipif(bool(LACK), reason=LACK)]


def arguments(run: Path) -> list[str]:
    return [f"run.dir={run}", f"steps={STEPS}", f"run.save_every={EVERY}", "run.keep_last=2", "data.pack_tokens=512"]


def settings(model: Path) -> dict[str, str]:
    """The 64-GPU script, scaled to two processes on the CPU."""
    return {
        "OVR_RECIPE": "tiny_cold_start",
        "OVR_MODEL": str(model),
        "OVR_GPUS": "0",
        "OVR_INTERFACE": "lo",
        "OVR_PREFLIGHT_S": str(LIMIT_S),
        "MASTER_ADDR": "127.0.0.1",
    }


RL_STEPS = 8


def rl_arguments(run: Path) -> list[str]:
    """The limit grows from the fifth iteration on."""
    sizes = [f"run.dir={run}", f"iterations={RL_STEPS}", "prompts=4", "responses=2", "run.save_every=2"]
    return [*sizes, "curriculum=[{until: 4, max_tokens: 72}, {until: 8, max_tokens: 88}]"]


def rl_settings(model: Path) -> dict[str, str]:
    return settings(model) | {"OVR_RECIPE": "tiny_rl"}


def curve(run: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "metrics/train.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if not key.startswith(CLOCKS)} for line in lines]


def python_of(loaded: Path, folder: Path) -> dict[str, str]:
    """Ranks that do what files in ``folder`` say, see `disturbed_rank`."""
    folder.mkdir()
    python = folder / "python"
    python.write_text(f'#!/bin/bash\nexec {loaded} {ROOT}/tests/slurm/disturbed_rank.py "$@"\n')
    python.chmod(0o755)
    return {"OVR_PYTHON": str(python), "DISTURBANCE": str(folder)}


def steps_seen(run: Path) -> int:
    path = run / "metrics/train.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def checkpointed(run: Path) -> int:
    return max((int(path.parent.name[5:]) for path in run.glob("checkpoints/step_*/manifest.json")), default=0)


def attempts(run: Path) -> list[dict[str, str]]:
    """The lines of summary, as dictionaries."""
    path = run / "logs/jobs.log"
    lines = path.read_text().splitlines() if path.exists() else []
    return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]


class BashRun:
    """A stage that bash runs on this machine, while the jobs wait for Slurm."""

    def __init__(self, script: Path, arguments: list[str], environment: dict[str, str]):
        self.output = Path(f"{arguments[0].removeprefix('run.dir=')}.out")
        self.process = subprocess.Popen(
            ["bash", script, *arguments],
            env=shell_environment() | environment | {"OVR_RANKS": "2"},
            stdout=self.output.open("w"),
            stderr=subprocess.STDOUT,
        )

    def finish(self) -> None:
        """Wait for the end, which must be a success."""
        assert self.process.wait(timeout=2 * LIMIT_S) == 0, self.output.read_text()

    def stop(self) -> None:
        """Kill what is left of it; its ranks are in a session of their own."""
        if self.process.poll() is None:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
            self.process.kill()


@dataclass(frozen=True)
class Jobs:
    """Jobs of a cluster: each has a name, which is that of its run folder in ``folder`` and of its output."""

    cluster: Cluster
    folder: Path
    model: Path

    def submit(self, name: str, *arguments: str | Path, nodes: int = 2, ranks: int = 1, **environment: str) -> str:
        """Submit a job of ``ranks`` on each of ``nodes``; returns its number."""
        scale = [f"--nodes={nodes}", f"--ntasks-per-node={ranks}", "--gpus-per-node=1", f"--output={name}.out"]
        return self.cluster.submit(*scale, *arguments, **environment)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for ``condition``; fails with the output of every job."""
        try:
            self.cluster.until(condition, LIMIT_S, what)
        except TimeoutError as error:
            outputs = [f"{path.name}: {path.read_text()}" for path in sorted(self.cluster.folder.glob("*.out"))]
            raise AssertionError("\n".join([str(error), *outputs])) from error

    def has_ended(self, job: str) -> bool:
        """Whether Slurm will not start it again."""
        return self.cluster.job(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

    def keep(self, name: str, job: str) -> None:
        """Write what Slurm says of a job, and its output, to its run folder."""
        (self.folder / name / "state").write_text(json.dumps(self.cluster.job(job)))
        (self.folder / name / "output").write_text((self.cluster.folder / f"{name}.out").read_text())


def disturb_cold_start(jobs: Jobs) -> None:
    """Run ``job``, which is preempted and loses a node, ``broken``, and PPO undisturbed."""
    cluster, run = jobs.cluster, jobs.folder / "job"
    job = jobs.submit("job", COLD_START, *arguments(run), **settings(jobs.model))
    (jobs.folder / "broken").mkdir()
    failing = settings(jobs.model) | {"OVR_PYTHON": "/bin/false", "OVR_MAX_FAILURES": "1"}
    broken = jobs.submit("broken", COLD_START, *arguments(jobs.folder / "broken"), nodes=1, **failing)
    jobs.wait(lambda: steps_seen(run) >= EVERY + 2, "the first steps")
    jobs.wait(lambda: cluster.job(broken)["JobState"] == "FAILED", "the broken job to be given up")
    jobs.keep("broken", broken)
    hosts = ",".join(cluster.hosts(job))
    cluster.submit("--partition=high", "--nodes=2", f"--nodelist={hosts}", "--exclusive", "--wrap=sleep 1")
    jobs.wait(lambda: len(attempts(run)) == 1, "the preempted job to leave")
    reached = checkpointed(run)
    jobs.wait(lambda: checkpointed(run) > reached, "the requeued job")
    cluster.kill_node(cluster.hosts(job)[-1])
    # Slurm takes most of a minute to give up the node and to start the job again.
    words = [*rl_arguments(jobs.folder / "rl_alone"), f"model.path={jobs.model}"]
    launch(ROOT / "ovr_megatron/rl/__main__.py", "--config-name", "tiny_rl", *words, ranks=2, timeout_s=2 * LIMIT_S)
    jobs.wait(lambda: jobs.has_ended(job), "the end of the job")
    jobs.keep("job", job)


def disturb_ppo(python: Path, jobs: Jobs, stack: ExitStack) -> BashRun:
    """Run ``rl``, whose time ends in an iteration, and ``absent``; return the cold start's undisturbed run, at work."""
    run, disturbance = jobs.folder / "rl", jobs.folder / "disturbance"
    slow = rl_settings(jobs.model) | python_of(python, disturbance)
    slow |= {"OVR_WARNING_S": "5"}  # it is --signal that warns
    job = jobs.submit("rl", "--signal=B:USR1@60", RL, *rl_arguments(run), **slow)
    (jobs.folder / "absent").mkdir()
    lacking = settings(jobs.model) | python_of(python, jobs.folder / "nobody")
    lacking |= {"OVR_WAIT_S": "2", "OVR_MAX_FAILURES": "0"}
    (jobs.folder / "nobody/absent").touch()
    words = [*arguments(jobs.folder / "absent"), "run.hang_timeout_s=20"]
    script = jobs.folder / "absent.sh"  # by `ovr slurm`, in the place of the one in slurm/
    slurm.main(["sft", "--write", str(script), *words])
    absent = jobs.submit("absent", script, nodes=1, ranks=2, **lacking)
    jobs.wait(lambda: steps_seen(run) >= 3, "the first iterations")
    (disturbance / "brake").touch()
    short = jobs.cluster.run("scontrol", "update", f"JobId={job}", "EndTime=now+80")
    assert short.returncode == 0, short.stderr
    jobs.wait(lambda: bool(attempts(run)) or jobs.has_ended(job), "the PPO job to leave")
    alone_settings = settings(jobs.model) | {"OVR_PYTHON": str(python)}
    alone = BashRun(COLD_START, arguments(jobs.folder / "alone"), alone_settings)
    stack.callback(alone.stop)
    # EndTime has changed the limit of the next attempt, too.
    jobs.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    (disturbance / "brake").unlink()
    jobs.wait(lambda: jobs.has_ended(job), "the end of the PPO job")
    jobs.wait(lambda: jobs.has_ended(absent), "the end of the job that lacks a rank")
    jobs.keep("absent", absent)
    jobs.keep("rl", job)
    return alone


@pytest.fixture(scope="module")
def runs(loaded_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``alone`` was run by bash and not disturbed, ``job`` by Slurm, which preempted it and lost one of its nodes.

    ``rl`` was run by Slurm, too, and ``rl_alone`` by ranks that this process launched.
    """
    folder = tmp_path_factory.mktemp("slurm")
    model = make_tiny_model(folder / "model", seed=5)
    with ExitStack() as stack:
        # Six nodes: two for either stage, one for either job that cannot work; when a node is lost, none is left over.
        jobs = Jobs(stack.enter_context(Cluster(folder / "cluster", nodes=6)), folder, model)
        with ThreadPoolExecutor(2) as pool:
            cold_start = pool.submit(disturb_cold_start, jobs)
            alone = pool.submit(disturb_ppo, loaded_python, jobs, stack)
        cold_start.result()
        alone.result().finish()
    return folder


def test_a_job_one_of_whose_ranks_never_starts_ends_with_a_sentence(runs: Path) -> None:
    output = (runs / "absent/output").read_text()
    assert json.loads((runs / "absent/state").read_text())["JobState"] == "FAILED", output
    assert [line["state"] for line in attempts(runs / "absent")] == ["failed"]
    assert "error: rank 1 of 2 did not start within 16 s" in output and "Traceback" not in output


def test_an_iteration_longer_than_the_warning_is_left_and_ends_as_if_it_had_not_been(runs: Path) -> None:
    state = json.loads((runs / "rl/state").read_text())
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), (runs / "rl/output").read_text()
    first, last = attempts(runs / "rl")[0], attempts(runs / "rl")[-1]
    assert (first["state"], last["state"]) == ("stopped,requeued", "finished")
    assert curve(runs / "rl") == curve(runs / "rl_alone")
    assert [line["curriculum/max_tokens"] for line in curve(runs / "rl")] == [72] * 4 + [88] * 4
    for name in ("policy", "critic"):
        alone, job = (
            load_file(runs / run / f"checkpoints/step_{RL_STEPS:06d}/{name}/model.safetensors")
            for run in ("rl_alone", "rl")
        )
        assert [key for key in alone if not alone[key].equal(job[key])] == []


def test_job_was_disturbed_twice_and_finished(runs: Path) -> None:
    state = json.loads((runs / "job/state").read_text())
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "2"), (runs / "job/output").read_text()
    first, last = attempts(runs / "job")[0], attempts(runs / "job")[-1]
    assert (first["state"], first["requeues"]) == ("stopped,requeued", "0")
    assert EVERY < int(first["steps"].split("/")[0]) < STEPS
    assert (last["state"], last["requeues"], last["steps"]) == ("finished", "2", f"{STEPS}/{STEPS}")
    assert last["checkpoint"] == str(runs / f"job/checkpoints/step_{STEPS:06d}")


def test_weights_and_curve_are_the_undisturbed_ones(runs: Path) -> None:
    alone, job = (
        load_file(runs / name / f"checkpoints/step_{STEPS:06d}/policy/model.safetensors") for name in ("alone", "job")
    )
    assert alone.keys() == job.keys()
    assert [name for name in alone if not alone[name].equal(job[name])] == []
    assert len(curve(runs / "job")) == STEPS
    assert curve(runs / "job") == curve(runs / "alone")


def test_every_rank_of_every_attempt_has_its_log(runs: Path) -> None:
    state = json.loads((runs / "job/state").read_text())
    for attempt in range(3):
        logs = runs / f"job/logs/{state['JobId']}/attempt_{attempt}"
        assert "preflight: ok: 2 ranks" in (logs / "preflight_000.log").read_text()
        assert (logs / "rank_001.log").exists()


def test_alone_was_summarised_too(runs: Path) -> None:
    (only,) = attempts(runs / "alone")
    assert (only["state"], only["steps"], only["requeues"]) == ("finished", f"{STEPS}/{STEPS}", "0")


def test_job_that_always_fails_is_given_up(runs: Path) -> None:
    assert json.loads((runs / "broken/state").read_text())["Restarts"] == "1"
    assert [line["state"] for line in attempts(runs / "broken")] == ["failed,requeued", "failed"]
