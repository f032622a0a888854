"""Trackers of other projects, each an optional extra of this package: Weights & Biases, MLflow and Trackio.

Keys and addresses come from the environment variables that these libraries document, never from the settings.  A
service cannot take records back: after a resume it has the steps since the checkpoint twice.
"""

from __future__ import annotations

import html
import os
import time
import uuid
from collections.abc import Mapping

from ovr_megatron.runtime.trackers.built_in import as_code
from ovr_megatron.runtime.trackers.protocol import TrackedRun

PROJECT = "ovr-megatron"  # where the service's own variable names none
_MLFLOW_BATCH = 1000  # metrics that MLflow takes in one request


class WandbTracker:
    """Logs to Weights & Biases; with ``WANDB_MODE=offline`` to ``RUN/wandb``, for ``wandb sync`` later."""

    def __init__(self, run: TrackedRun):
        import wandb

        run_id = run.id_of("wandb") or uuid.uuid4().hex
        settings = wandb.Settings(
            console="off",  # it would replace stdout and stderr
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,  # which has the command line, and a secret may stand there
        )
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.folder.name,
            id=run_id,
            resume="allow",
            dir=run.folder,
            config=dict(run.settings),
            settings=settings,
        )
        # Its own step only rises: a resumed run, and an evaluation of earlier weights, would be dropped.
        self.run.define_metric("*", step_metric="step")
        run.remember_id("wandb", run_id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue the metrics for wandb's process."""
        self.run.log({"step": step, **metrics})

    def log_text(self, step: int, name: str, text: str) -> None:
        """Queue ``text`` as a page that shows it verbatim."""
        import wandb

        self.run.log({"step": step, name: wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)})

    def close(self) -> None:
        """Wait for what is queued and mark the run as finished."""
        self.run.finish()


class MlflowTracker:
    """Logs to the MLflow server of ``MLFLOW_TRACKING_URI``; without one to a database in ``RUN/mlflow``."""

    def __init__(self, run: TrackedRun):
        from mlflow import MlflowClient

        folder = run.folder.resolve() / "mlflow"
        address = os.environ.get("MLFLOW_TRACKING_URI")
        artifacts = None
        if not address:
            folder.mkdir(exist_ok=True)
            address = f"sqlite:///{folder / 'mlflow.db'}"
            artifacts = (folder / "artifacts").as_uri()
        self.client = MlflowClient(tracking_uri=address)
        self.run_id = run.id_of("mlflow") or ""
        if self.run_id:
            self.client.update_run(self.run_id, "RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(name, artifacts)
        self.run_id = self.client.create_run(experiment_id, run_name=run.folder.name).info.run_id
        run.remember_id("mlflow", self.run_id)
        self.client.log_dict(self.run_id, dict(run.settings), "config.yaml")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send the metrics and wait for the answer."""
        from mlflow.entities import Metric

        milliseconds = int(time.time() * 1000)
        values = [Metric(name, float(value), milliseconds, step) for name, value in metrics.items()]
        for start in range(0, len(values), _MLFLOW_BATCH):
            self.client.log_batch(self.run_id, values[start : start + _MLFLOW_BATCH])

    def log_text(self, step: int, name: str, text: str) -> None:
        """Send ``text`` as the artifact ``NAME/STEP.txt``."""
        self.client.log_text(self.run_id, text, f"{name}/{step:06d}.txt")

    def close(self) -> None:
        """Mark the run as finished."""
        self.client.set_terminated(self.run_id)


class TrackioTracker:
    """Logs to Trackio's database in ``TRACKIO_DIR``, or where ``TRACKIO_SPACE_ID`` or ``TRACKIO_SERVER_URL`` says."""

    def __init__(self, run: TrackedRun):
        import trackio

        # Trackio resumes by name, and folders of two runs may have the same one.
        name = run.id_of("trackio") or f"{run.folder.name}-{uuid.uuid4().hex[:8]}"
        self.run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=name,
            resume="allow",
            config=dict(run.settings),
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        run.remember_id("trackio", name)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queue the metrics for Trackio's thread."""
        self.run.log(dict(metrics), step=step)

    def log_text(self, step: int, name: str, text: str) -> None:
        """Queue ``text`` in Markdown that shows it verbatim."""
        import trackio

        self.run.log({name: trackio.Markdown(as_code(text))}, step=step)

    def close(self) -> None:
        """Wait for what is queued."""
        self.run.finish()
