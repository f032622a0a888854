"""Check every node before a run starts, with one process a rank: the checks of `ovr preflight`."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from ovr_megatron.checkpoint.store import weights_of
from ovr_megatron.config import ColdStartConfig, ConfigError, RLConfig
from ovr_megatron.data.processing import Processor
from ovr_megatron.data.remote_files import is_url
from ovr_megatron.data.sources import SUFFIXES, local_path
from ovr_megatron.data.tar_shards import expand_shards
from ovr_megatron.data.tokenised import TokenisedSet
from ovr_megatron.data_checks import check_sample, row_sources
from ovr_megatron.errors import UserError
from ovr_megatron.families import ModelShape
from ovr_megatron.families.config_json import ShapeError
from ovr_megatron.model.layers import choose_layer_classes
from ovr_megatron.model.transformer_config import DTYPES
from ovr_megatron.plan import deadlines, report
from ovr_megatron.plan.memory import checkpoint_bytes
from ovr_megatron.runtime import cpu, distributed, preflight
from ovr_megatron.runtime.stop import JoinError
from ovr_megatron.runtime.terminal import printable
from ovr_megatron.runtime.trackers.protocol import TrackerError
from ovr_megatron.runtime.trackers.table import check_trackers
from ovr_megatron.weights.folder import WeightFolder
from ovr_megatron.weights.transfer import check_weights

TIME_LIMIT_S = 240  # of a collective; the launcher's limit of all checks together, OVR_PREFLIGHT_S, is above it
SAMPLE_ROWS = 32  # of each source
Config = ColdStartConfig | RLConfig


def list_inputs(config: Config) -> tuple[list[Path], list[str]]:
    """Return the files and folders that the run reads, and a problem if it has no data."""
    paths = [weights_of(config.model.path)]
    if isinstance(config, RLConfig):
        frozen_models = (config.algorithm.teacher, config.algorithm.reference)
        paths += [weights_of(path) for path in frozen_models if path]
        if config.critic.path:
            paths.append(weights_of(config.critic.path, "critic"))
    problems = []
    for source in row_sources(config):
        if source.path.startswith("puzzle:") or is_url(source.path):
            continue
        path = local_path(source.path)[0]
        shards = expand_shards(source.path)
        if path is None and shards != [source.path]:
            paths += [Path(shard).expanduser() for shard in shards]
        elif path is None and (source.path.endswith(SUFFIXES) or os.environ.get("HF_HUB_OFFLINE") == "1"):
            path = Path(source.path).expanduser()  # any other source is the name of a Hugging Face data set
        if path is not None:
            paths.append(path)
    if config.data.exclude:
        paths.append(Path(config.data.exclude))
    if config.data.tokenised:
        paths.append(Path(config.data.tokenised))
    elif not config.data.sources:
        problems.append("there are no data; give OVR_DATA=PATH, data.tokenised=DIR or 'data.sources=[{path: FILE}]'")
    return paths, problems


def run_bytes(config: Config) -> int:
    """Return the bytes of the checkpoints that the run keeps, and of one more while it is written.

    It is 0 where the model cannot be read.
    """
    try:
        shape = ModelShape.from_hf(weights_of(config.model.path))
        critic_shape = report.read_critic_shape(config)
    except (ShapeError, ConfigError):  # `check_model` or the plan reports the error
        return 0
    steps = config.iterations if isinstance(config, RLConfig) else config.steps
    checkpoints = config.run.keep_last or -(-steps // config.run.save_every)
    return checkpoint_bytes(config, shape, critic_shape) * (checkpoints + 1)


@dataclass(frozen=True)
class Floors:
    """Rates under which a run is refused: an all-reduce in GB/s of the bus, run.dir in MB/s of each node."""

    bus: float
    write: float


def read_floors() -> Floors:
    """Read the floors of the environment.

    Raises:
        ConfigError: a floor is no number.
    """
    # The defaults are the rates of 100 Gbit/s Ethernet and of one old disk.
    return Floors(bus=_read_floor("OVR_MIN_BUS_GBPS", 10), write=_read_floor("OVR_MIN_WRITE_MBPS", 100))


def _read_floor(name: str, default: float) -> float:
    """Return the floor in the variable ``name``; where it is not set, ``default`` with a GPU and 0 without."""
    text = os.environ.get(name)
    if not text:
        return default if torch.cuda.is_available() else 0
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r} must be a number") from None


def run_checks(config: Config) -> tuple[list[str], dict[str, float]]:
    """Run every check on this rank; return the problems of all ranks, and the measured rates.  A collective."""
    run = Path(config.run.dir)
    floors = read_floors()
    paths, problems = list_inputs(config)
    hang_timeout_s = config.run.hang_timeout_s and min(config.run.hang_timeout_s, TIME_LIMIT_S)  # 0: no bound
    device = distributed.join(hang_timeout_s, TIME_LIMIT_S)
    local_rank = int(os.environ["LOCAL_RANK"])
    ranks = dist.get_world_size()
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    main_rank = dist.get_rank() == 0
    with_gpus = os.environ.get("OVR_GPUS") != "0"

    # Ranks must not return early on a problem of their own: the collectives below wait for every rank.
    facts: list[preflight.Facts | None] = [None] * ranks
    dist.all_gather_object(facts, preflight.gather_facts(paths))
    if main_rank:
        problems += check_layout(config, ranks)
        problems += preflight.differences([rank_facts for rank_facts in facts if rank_facts])
    if with_gpus:
        problems += preflight.check_gpus(local_rank, local_size)
        problems += check_layers(config) + preflight.check_cudnn()
    if local_rank == 0:
        problems += check_model(config, main_rank) + check_packages(config)
        for path in paths:
            problems += preflight.check_readable(path)

    measured: dict[str, float] = {}
    problems += check_folder(run, local_rank, run_bytes(config), floors, measured)
    if main_rank and with_gpus:
        nodes = -(-ranks // local_size)
        write_rate = measured.get("write MB/s", math.inf) * 1e6 * nodes
        problems += check_plan(config, ranks, write_rate)
    if ranks > 1 and (device.type == "cuda" or not with_gpus):
        bus_rate = preflight.bus_bandwidth(device, 256 if with_gpus else 8)
        measured["all-reduce GB/s"] = bus_rate
        if main_rank and bus_rate < floors.bus:
            problems.append(
                f"the all-reduce over {ranks} ranks runs at {bus_rate:.2f} GB/s, under "
                f"OVR_MIN_BUS_GBPS={floors.bus:g}; see that NCCL takes the fast network "
                "(OVR_INTERFACE, OVR_HCA), or leave a slow node out"
            )
    return preflight.gather(problems), measured


def check_model(config: Config, with_rows: bool) -> list[str]:
    """Open tokenizer, processor, template, weights and the tokenised set, and check some rows of each source.

    The tensors' names and shapes are checked, not their values; rows only ``with_rows``.
    """
    source = weights_of(config.model.path)
    if not source.is_dir():
        return []  # `preflight.check_readable` says so
    try:
        processor = Processor(source, config.data)
        with WeightFolder(source) as folder:
            check_weights(folder, processor.shape)
        if config.data.tokenised:
            TokenisedSet(config.data.tokenised, processor)
        return check_sample(config, processor, SAMPLE_ROWS) if with_rows and config.data.sources else []
    except UserError as error:
        return [str(error)]


def check_folder(run: Path, local_rank: int, needed: int, floors: Floors, measured: dict[str, float]) -> list[str]:
    """Check that run.dir can be written, fast enough, has room, and is one folder on all nodes.  A collective.

    Args:
        run: The run folder; it is made.
        local_rank: Rank within the node; the first rank of each node measures.
        needed: Bytes that the run will write.
        floors: Rates under which the run is refused.
        measured: Takes the rate of writing.
    """
    problems: list[str] = []
    unusable: list[str] = []
    try:
        run.mkdir(parents=True, exist_ok=True)
        if local_rank == 0:
            rate = preflight.write_rate(run, 64)
            measured["write MB/s"] = rate
            if rate < floors.write:
                problems.append(f"{run} is written at {rate:.0f} MB/s, under OVR_MIN_WRITE_MBPS={floors.write:g}")
            problems += preflight.check_space(run, needed)
    except OSError as error:
        unusable = [f"{run} cannot be written ({error.strerror}); give another run.dir"]
    # All ranks learn of it: `check_shared` is a collective that a rank without the folder cannot take part in.
    if preflight.gather(unusable):
        return problems + unusable
    return problems + preflight.check_shared(run)


def check_layers(config: Config) -> list[str]:
    """Check that Transformer Engine can be used: without it ``model.layers=auto`` takes our layers in silence."""
    if config.model.layers != "auto" or config.model.dtype == "float32":  # float32 always takes our layers
        return []
    try:
        choose_layer_classes("transformer_engine", DTYPES[config.model.dtype])
    except ConfigError as error:
        reason = str(error).removeprefix("model.layers=").partition(";")[0]
        return [f"{reason}; install it, or say model.layers=local to train several times more slowly without it"]
    return []


def check_packages(config: Config) -> list[str]:
    """Check that the trackers of the run are known and installed."""
    try:
        check_trackers(config.run.trackers)
    except TrackerError as error:
        return [str(error)]
    return []


def check_plan(config: Config, ranks: int, write_rate: float) -> list[str]:
    """Check that the plan's largest phase fits into this rank's GPU, and its seconds into the job's limits.

    Without a GPU nothing is checked.

    Args:
        config: A stage's configuration.
        ranks: Number of ranks of the run.
        write_rate: Bytes per second that all nodes together write to run.dir.
    """
    if not torch.cuda.is_available():
        return []
    try:
        plan = report.plan(config, report.Options(ranks, search=False))
    except UserError as error:
        return [str(error)]
    problems = []
    if isinstance(config, ColdStartConfig) or config.only in ("all", "train", "critic"):
        limits = deadlines.read_limits(os.environ)
        problems += deadlines.problems(plan, limits, config.run.hang_timeout_s, write_rate)
    largest = max(plan["phases"], key=lambda phase: phase["total"])
    gpu_bytes = torch.cuda.mem_get_info()[1]
    if largest["total"] > gpu_bytes:
        memory = f"{largest['total'] / 2**30:.1f} GiB of the {gpu_bytes / 2**30:.1f} of a GPU"
        problems.append(f"the plan takes {memory} (phase {largest['name']}); `ovr plan` lists layouts that fit")
    return problems


def check_layout(config: Config, ranks: int) -> list[str]:
    """Check that the layout divides the ranks, and that the data-parallel replicas divide the batch."""
    try:
        # `report.plan` says so where there would be no rank to train.
        replicas = config.parallel.data_parallel(max(ranks - config.rollout.ranks, 0)) or 1
    except ConfigError as error:
        return [str(error)]
    batch_key = "packs_per_step" if isinstance(config, ColdStartConfig) else "prompts"
    batch_size = getattr(config, batch_key)
    if batch_size % replicas:
        return [f"{batch_key}={batch_size} cannot be dealt to {replicas} data-parallel replicas"]
    return []


def check(config: Config, began: float) -> int:
    """Run the checks; print the figures or a sentence for each problem; return the exit code, 2 for a problem.

    Args:
        config: A stage's configuration.
        began: `time.monotonic` at the start of the command.
    """
    main_rank = os.environ.get("RANK", "0") == "0"
    cpu.let_megatron_run()
    try:
        problems, measured = run_checks(config)
    except ConfigError as error:
        if main_rank:
            print(printable(f"preflight: {error}"), flush=True)
        return 2
    except JoinError as error:
        print(f"preflight: {error}", flush=True)
        return 3
    except dist.DistError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).partition("\n")[0]
        problem = f"{preflight.host_name()} cannot work with the others over {address}: {reason}"
        print(printable(f"preflight: {problem}"), flush=True)
        return 3
    if main_rank:
        for problem in problems:
            print(printable(f"preflight: {problem}"))
        figures = ", ".join(f"{name} {value:.2f}" for name, value in measured.items())
        verdict = "refused" if problems else "ok"
        machines = f"{dist.get_world_size()} ranks, {torch.cuda.device_count()} GPUs a node"
        commit = preflight.commit()
        seconds = time.monotonic() - began
        print(f"preflight: {verdict}: {machines}, {figures}, commit {commit}, {seconds:.1f} s", flush=True)
    distributed.finish()
    return 2 if problems else 0
