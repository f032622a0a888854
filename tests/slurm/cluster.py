"""A real Slurm on loopback: munge, slurmctld and several slurmd in one folder, as root, without systemd and cgroups."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil

# What a launcher, or a test of this process that joined a process group, may have left.
_LAUNCHERS = ("SLURM", "SBATCH", "OVR_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_")

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")


def shell_environment() -> dict[str, str]:
    """The environment of a user's shell."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}


CONFIG = """\
ClusterName=loopback
SlurmctldHost=localhost
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SlurmdTimeout=15
GresTypes=gpu
ReturnToService=2
KillWait=10
MinJobAge=86400
JobRequeue=1
EnforcePartLimits=ALL
MailProg=/bin/true
# Without it a preempted job is told nothing that reaches its script, and leaves without being requeued.
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
NodeName=n[1-{nodes}] NodeHostname=localhost NodeAddr=127.0.0.1 Port={first}-{last} CPUs=4 RealMemory=4000 Gres=gpu:1
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=300
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """What this machine lacks for it, or nothing."""
    if os.geteuid() != 0:
        return "a Slurm of one's own takes root"
    absent = [name for name in PROGRAMS if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]
    return f"{', '.join(absent)} not installed (on Debian: slurm-wlm, slurmctld, slurmd, munge)" if absent else ""


def free_ports(count: int) -> int:
    """The first of ``count`` neighbouring ports that nobody listens on, below those that the kernel gives away."""
    while True:
        first = random.randrange(15_000, 31_000)
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


class Cluster:
    """Nodes n1, n2, ... of one machine; jobs of the partition ``high`` preempt those of ``low``.  A context manager."""

    def __init__(self, folder: Path, nodes: int):
        self.folder, self.nodes = folder, [f"n{number + 1}" for number in range(nodes)]
        self.environment = shell_environment() | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
        }
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("munge", "state", "log", *(f"spool/{node}" for node in self.nodes)):
            (folder / name).mkdir(parents=True, mode=0o755)
        port = free_ports(nodes + 1)
        config = CONFIG.format(folder=folder, port=port, nodes=nodes, first=port + 1, last=port + nodes)
        (folder / "slurm.conf").write_text(config)
        (folder / "gres.conf").write_text(f"NodeName=n[1-{nodes}] Name=gpu File=/dev/null\n")  # any device
        key = folder / "munge/key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)

    def __enter__(self) -> Cluster:
        try:
            self.bring_up()
        except BaseException:
            self.take_down()
            raise
        return self

    def bring_up(self) -> None:
        """Start every daemon and wait until the nodes are idle."""
        munge = self.folder / "munge"
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        self.start("munged", "munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *files)
        self.until(lambda: (munge / "socket").exists(), 30, "munged")
        self.start("slurmctld", "slurmctld", "-D")
        for node in self.nodes:
            self.start(node, "slurmd", "-D", "-N", node)
        self.until(lambda: self.idle() == len(self.nodes), 60, "the nodes")

    def __exit__(self, *error: object) -> None:
        self.run("scancel", "--user=root")
        deadline = time.monotonic() + 30
        while self.run("squeue", "--noheader").stdout.strip() and time.monotonic() < deadline:
            time.sleep(0.5)
        self.take_down()

    def take_down(self) -> None:
        """End the daemons, the last one first, and what they may have left."""
        for process in reversed(self.daemons.values()):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        for step in self.processes():
            step.kill()

    def start(self, name: str, *command: str) -> None:
        """Start a daemon in a session of its own."""
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                command, env=self.environment, stdout=out, stderr=out, start_new_session=True
            )

    def run(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run one of Slurm's commands."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120)

    def idle(self) -> int:
        """How many nodes wait for work."""
        return len(self.run("sinfo", "-h", "-N", "-p", "low", "-t", "idle", "-o", "%N").stdout.split())

    def submit(self, *arguments: str | Path, **environment: str) -> str:
        """Submit a batch job; returns its number."""
        command = ["sbatch", "--parsable", *map(str, arguments)]
        result = subprocess.run(
            command, env=self.environment | environment, capture_output=True, text=True, cwd=self.folder, timeout=120
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What Slurm says of a job."""
        words = self.run("scontrol", "show", "job", "-o", job).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def hosts(self, job: str) -> list[str]:
        """The nodes of a job, the one that runs its script first."""
        return self.run("scontrol", "show", "hostnames", self.job(job)["NodeList"]).stdout.split()

    def kill_node(self, node: str) -> None:
        """As if ``node`` lost its power: its daemon and all that runs under it, at once."""
        self.daemons[node].send_signal(signal.SIGKILL)
        self.daemons.pop(node).wait()
        for process in self.processes(node):
            process.kill()

    def processes(self, node: str = "") -> list[psutil.Process]:
        """Steps of a node (of all without one), with everything below them."""
        found = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
            except psutil.Error:
                continue
            mine = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
            named = environment.get("SLURMD_NODENAME", "")
            step = process.name() == "slurmstepd" and any(f"[{node}" in part for part in process.cmdline())
            if mine and (named == node or (not node and named) or step):
                found.append(process)
                found += [parent for parent in process.parents() if parent.name() == "slurmstepd"]
        return list(dict.fromkeys(found))

    def until(self, condition: object, seconds: float, what: str) -> None:
        """Wait for ``condition``; fails with the tail of the daemons' logs."""
        deadline = time.monotonic() + seconds
        while not condition():  # type: ignore[operator]
            if time.monotonic() > deadline:
                logs = [f"{path.name}: {path.read_text(errors='replace')[-600:]}" for path in self.folder.glob("log/*")]
                raise TimeoutError(f"waited {seconds:.0f} s for {what}\n" + "\n".join(logs))
            time.sleep(0.3)
