"""The checks of `tools/preflight.py`: every node looked at before a run starts, one process a rank."""

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
from ovr_megatron.data.sources import SUFFIXES, local_path
from ovr_megatron.data.tokenised import TokenisedSet
from ovr_megatron.data_checks import check_sample
from ovr_megatron.errors import UserError
from ovr_megatron.model.layers import choose_layer_classes
from ovr_megatron.model.qwen25vl import DTYPES
from ovr_megatron.plan import deadlines, report
from ovr_megatron.runtime import cpu, distributed, preflight
from ovr_megatron.runtime.stop import JoinError
from ovr_megatron.runtime.terminal import printable
from ovr_megatron.weights.folder import WeightFolder
from ovr_megatron.weights.transfer import check_weights

TIME_LIMIT_S = 240  # of a collective; the launcher's limit for the whole, OVR_PREFLIGHT_S, is above it
SAMPLE_ROWS = 32  # of each source
Config = ColdStartConfig | RLConfig


def inputs(config: Config) -> tuple[list[Path], list[str]]:
    """Files and folders that the run reads, and problems of those that are named and absent."""
    found, problems = [weights_of(config.model.path)], []
    for source in config.data.sources:
        if source.path.startswith("puzzle:"):
            continue
        path = local_path(source.path)[0]
        if path is None and (source.path.endswith(SUFFIXES) or os.environ.get("HF_HUB_OFFLINE") == "1"):
            path = Path(source.path).expanduser()  # anything else is a name on the hub
        if path is not None:
            found.append(path)
    if config.data.exclude:
        found.append(Path(config.data.exclude))
    if config.data.tokenised:
        found.append(Path(config.data.tokenised))
    elif not config.data.sources:
        problems.append("there are no data; give OVR_DATA=PATH, data.tokenised=DIR or 'data.sources=[{path: FILE}]'")
    return found, problems


def checkpoint_bytes(config: Config) -> int:
    """Bytes of the checkpoints that the run keeps, one more while it writes; 0 where the model cannot be read.

    Adam's moments and, of bfloat16 weights, the float32 master copy lie beside the weights; RL has two models.
    """
    weights = sum(path.stat().st_size for path in weights_of(config.model.path).glob("*.safetensors"))
    rl = isinstance(config, RLConfig)
    steps = config.iterations if isinstance(config, RLConfig) else config.steps
    kept = config.run.keep_last or -(-steps // config.run.save_every)
    each = weights * (7 if config.model.dtype == "bfloat16" else 3) * (2 if rl else 1)
    return each * (kept + 1)


@dataclass(frozen=True)
class Floors:
    """Rates under which a run is refused: all-reduce in GB/s of the bus, run.dir in MB/s of each node."""

    bus: float
    write: float


def read_floors() -> Floors:
    """The floors of the environment; by default what Ethernet of 100 Gbit/s or one old disk would give, on GPUs.

    Raises:
        ConfigError: one is no number.
    """
    values = []
    for name, default in (("OVR_MIN_BUS_GBPS", 10), ("OVR_MIN_WRITE_MBPS", 100)):
        given = os.environ.get(name)
        try:
            values.append(float(given) if given else default if torch.cuda.is_available() else 0)
        except ValueError:
            raise ConfigError(f"{name}={given!r} must be a number") from None
    return Floors(*values)


def look(config: Config) -> tuple[list[str], dict[str, float]]:
    """Every check, on this rank; problems of all ranks, and what was measured.  A collective."""
    run, floors = Path(config.run.dir), read_floors()
    read, problems = inputs(config)
    device = distributed.join(config.run.hang_timeout_s and min(config.run.hang_timeout_s, TIME_LIMIT_S), TIME_LIMIT_S)
    local_rank, ranks = int(os.environ["LOCAL_RANK"]), dist.get_world_size()
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    main_rank, with_gpus = dist.get_rank() == 0, os.environ.get("OVR_GPUS") != "0"
    facts: list[preflight.Facts | None] = [None] * ranks
    dist.all_gather_object(facts, preflight.gather_facts(read))
    if main_rank:
        problems += fitting(config, ranks) + preflight.differences([item for item in facts if item])
    if with_gpus:
        problems += preflight.check_gpus(local_rank, local_size)
        problems += check_layers(config) + preflight.check_cudnn()
    if local_rank == 0:
        problems += check_model(config, main_rank)
        problems += [problem for path in read for problem in preflight.check_readable(path)]
    measured: dict[str, float] = {}
    problems += check_folder(run, local_rank, checkpoint_bytes(config), floors, measured)
    if main_rank and with_gpus:
        rate = measured.get("write MB/s", math.inf) * 1e6 * -(-ranks // local_size)
        problems += check_plan(config, ranks, rate)
    if ranks > 1 and (device.type == "cuda" or not with_gpus):
        measured["all-reduce GB/s"] = rate = preflight.bus_bandwidth(device, 256 if with_gpus else 8)
        if main_rank and rate < floors.bus:
            problems.append(
                f"the all-reduce over {ranks} ranks runs at {rate:.2f} GB/s, under OVR_MIN_BUS_GBPS={floors.bus:g}; "
                "see that NCCL takes the fast network (OVR_INTERFACE, OVR_HCA), or leave a slow node out"
            )
    return preflight.gather(problems), measured


def check_model(config: Config, with_rows: bool) -> list[str]:
    """Open what the run will open: tokenizer, processor, template, weights' names, the set or rows of each source."""
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
    """Run.dir can be written, fast enough, has room, and is one folder.  A collective."""
    problems: list[str] = []
    unusable: list[str] = []
    try:
        run.mkdir(parents=True, exist_ok=True)
        if local_rank == 0:
            measured["write MB/s"] = rate = preflight.write_rate(run, 64)
            if rate < floors.write:
                problems.append(f"{run} is written at {rate:.0f} MB/s, under OVR_MIN_WRITE_MBPS={floors.write:g}")
            problems += preflight.check_space(run, needed)
    except OSError as error:
        unusable = [f"{run} cannot be written ({error.strerror}); give another run.dir"]
    if preflight.gather(unusable):
        return problems + unusable
    return problems + preflight.check_shared(run)


def check_layers(config: Config) -> list[str]:
    """Whether Transformer Engine is there, which ``model.layers=auto`` would otherwise do without in silence."""
    if config.model.layers != "auto" or config.model.dtype == "float32":  # in float32 ours are taken in any case
        return []
    try:
        choose_layer_classes("transformer_engine", DTYPES[config.model.dtype])
    except ConfigError as error:
        reason = str(error).removeprefix("model.layers=").partition(";")[0]
        return [f"{reason}; install it, or say model.layers=local to train several times more slowly without it"]
    return []


def check_plan(config: Config, ranks: int, write_rate: float) -> list[str]:
    """Whether the plan's largest phase goes into this rank's GPU, and its seconds into the job's limits.

    Nothing where there is no GPU.  ``write_rate`` is that of all nodes together, in bytes a second.
    """
    if not torch.cuda.is_available():
        return []
    try:
        found = report.plan(config, report.Options(ranks, search=False))
    except UserError as error:
        return [str(error)]
    problems = []
    if isinstance(config, ColdStartConfig) or config.only in ("all", "train"):
        limits = deadlines.read_limits(os.environ)
        problems += deadlines.problems(found, limits, config.run.hang_timeout_s, write_rate)
    worst = max(found["phases"], key=lambda phase: phase["total"])
    have = torch.cuda.mem_get_info()[1]
    if worst["total"] > have:
        need = f"{worst['total'] / 2**30:.1f} GiB of the {have / 2**30:.1f} of a GPU"
        problems.append(f"the plan takes {need} (phase {worst['name']}); `tools/plan.py` lists layouts that fit")
    return problems


def fitting(config: Config, ranks: int) -> list[str]:
    """Whether the layout goes into this many ranks."""
    try:
        replicas = config.parallel.data_parallel(ranks)
        share = config.packs_per_step if isinstance(config, ColdStartConfig) else config.prompts
        what = "packs_per_step" if isinstance(config, ColdStartConfig) else "prompts"
    except ConfigError as error:
        return [str(error)]
    return [] if share % replicas == 0 else [f"{what}={share} cannot be dealt to {replicas} data-parallel replicas"]


def check(config: Config, began: float) -> int:
    """Look, and print the figures or a sentence for each problem; return the exit code, 2 where there is a problem."""
    main_rank = os.environ.get("RANK", "0") == "0"
    cpu.let_megatron_run()
    try:
        problems, measured = look(config)
    except ConfigError as error:
        if main_rank:
            print(printable(f"preflight: {error}"), flush=True)
        return 2
    except JoinError as error:
        print(f"preflight: {error}", flush=True)
        return 3
    except dist.DistError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).partition("\n")[0]
        problem = f"{preflight.host_name()} cannot work with the others over {where}: {reason}"
        print(printable(f"preflight: {problem}"), flush=True)
        return 3
    if main_rank:
        for problem in problems:
            print(printable(f"preflight: {problem}"))
        figures = ", ".join(f"{name} {value:.2f}" for name, value in measured.items())
        verdict = "refused" if problems else "ok"
        print(f"preflight: {verdict}: {dist.get_world_size()} ranks, {torch.cuda.device_count()} GPUs a node, "
              f"{figures}, commit {preflight.commit()}, {time.monotonic() - began:.1f} s", flush=True)  # fmt: skip
    distributed.finish()
    return 2 if problems else 0
