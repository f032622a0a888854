"""The table of trackers by the names that ``run.trackers`` takes, and how they are added, checked and opened."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ovr_megatron.runtime.logs import get_logger
from ovr_megatron.runtime.registry import Registry
from ovr_megatron.runtime.trackers.background import BackgroundTracker, describe
from ovr_megatron.runtime.trackers.built_in import JsonlTracker, TensorBoardTracker
from ovr_megatron.runtime.trackers.hosted import MlflowTracker, TrackioTracker, WandbTracker
from ovr_megatron.runtime.trackers.protocol import TrackedRun, Tracker, TrackerError

logger = get_logger(__name__)

OpenTracker = Callable[[TrackedRun], Tracker]


@dataclass(frozen=True)
class TrackerKind:
    """A row of the table.

    Attributes:
        open: starts the tracker for a run; on a resume it goes on with the records of the run.
        package: name of the extra of this package, and of the module, that it needs.
        writes_files: it only appends to the run folder, so it is called in the training thread: a record is on the
            disk before the next step begins.
    """

    open: OpenTracker
    package: str | None = None
    writes_files: bool = False


TRACKERS = Registry[TrackerKind](
    "run.trackers",
    {
        "jsonl": TrackerKind(JsonlTracker, writes_files=True),
        "tensorboard": TrackerKind(TensorBoardTracker, writes_files=True),
        "wandb": TrackerKind(WandbTracker, package="wandb"),
        "mlflow": TrackerKind(MlflowTracker, package="mlflow"),
        "trackio": TrackerKind(TrackioTracker, package="trackio"),
    },
    lambda value: TrackerKind(value) if callable(value) else None,
    error=TrackerError,
)


def register_tracker(name: str, open_tracker: OpenTracker) -> None:
    """Let ``run.trackers`` take ``name``, for example for a class whose ``__init__`` takes a `TrackedRun`.

    Raises:
        TrackerError: the name is taken.
    """
    TRACKERS.register(name, TrackerKind(open_tracker))


def check_trackers(names: Sequence[str]) -> None:
    """Refuse names that no tracker has, and trackers whose package is not installed.

    Raises:
        TrackerError: names the tracker and the remedy.
    """
    for name in names:
        package = TRACKERS.look_up(name).package
        spec = importlib.util.find_spec(package) if package else None
        # A folder of that name, such as wandb makes in the working directory, is a module without an origin.
        if package and (spec is None or spec.origin is None):
            raise TrackerError(
                f"run.trackers: {name} is not installed; pip install 'ovr-megatron[{package}]', or leave {name} out"
            )


def open_trackers(names: Sequence[str], run: TrackedRun) -> list[Tracker]:
    """Start the trackers of ``names``.

    A service that cannot be reached when a run begins is an error.  A run that has been tracked before goes on
    without it: a batch system may restart it while nobody looks.

    Raises:
        TrackerError: a tracker is not known, or cannot be started for a new run.
    """
    check_trackers(names)
    trackers: list[Tracker] = []
    for name in names:
        kind = TRACKERS.look_up(name)
        if kind.writes_files:
            trackers.append(kind.open(run))
            continue
        try:
            trackers.append(BackgroundTracker(name, _open(name, kind, run)))
        except TrackerError as error:
            if run.id_of(name) is None:
                raise
            logger.warning(f"{error}; the run goes on without it")
    return trackers


def _open(name: str, kind: TrackerKind, run: TrackedRun) -> Tracker:
    try:
        return kind.open(run)
    except Exception as error:
        raise TrackerError(
            f"run.trackers: {name} cannot be started ({describe(error)}); see its settings in the environment, such "
            f"as address and key, or leave {name} out"
        ) from error
