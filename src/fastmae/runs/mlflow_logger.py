"""MLflow, for `--logger mlflow`. Its own environment variables choose the server and the experiment.

MLFLOW_TRACKING_URI names a server, a database or a folder; MLFLOW_EXPERIMENT_NAME the experiment, else it is "fastmae".
"""

import importlib
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

from fastmae.runs.logged_run import LoggedRun, decoded, keep_ids, read_ids

log = logging.getLogger(__name__)

EXPERIMENT = "fastmae"
DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # A server that does not answer would otherwise hold up the run for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
"""Variables of the package, where the user has not set them."""
LONGEST_VALUE = 500
"""Characters of an option, which all of MLflow's stores take."""


class MlflowLogger:
    """A run in MLflow, named like the run's folder. A continued run goes on there under the same id.

    Args:
        run: the run.

    Raises:
        Exception: whatever the package raises, where the server can't be reached, say.
    """

    def __init__(self, run: LoggedRun):
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        self.package: Any = importlib.import_module("mlflow")
        self.client = self.package.MlflowClient()
        self.last_steps: dict[str, int] = {}
        known = read_ids(run.folder).mlflow
        self.continued = bool(known) and self._reopened(known)
        self.id = known if self.continued else self._created(run)
        keep_ids(run.folder, mlflow=self.id)
        log.info(f"--logger mlflow: run {self.id} at {self.package.get_tracking_uri()}")

    def _reopened(self, run_id: str) -> bool:
        """Whether the tracking server knows the run, which is then marked as running."""
        try:
            self.client.get_run(run_id)
        except self.package.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        self.client.update_run(run_id, status="RUNNING")
        return True

    def _created(self, run: LoggedRun) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        experiment = self.client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self.client.create_experiment(name)
        created = self.client.create_run(experiment_id, run_name=run.folder.resolve().name)
        run_id: str = created.info.run_id
        param = self.package.entities.Param
        options = {"task": run.task, **run.options}
        self.client.log_batch(
            run_id, params=[param(name, str(value)[:LONGEST_VALUE]) for name, value in options.items()]
        )
        return run_id

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """All figures of a step at once. Of a step that is there, as after a kill, MLflow would keep both values."""
        now, metric = int(1000 * time.time()), self.package.entities.Metric
        new = {name: value for name, value in values.items() if step > self._last_step(name)}
        if new:
            self.client.log_batch(self.id, metrics=[metric(name, value, now, step) for name, value in new.items()])
            self.last_steps |= dict.fromkeys(new, step)

    def _last_step(self, name: str) -> int:
        """The last step of a figure that MLflow has; -1: none."""
        if name not in self.last_steps:
            history = self.client.get_metric_history(self.id, name) if self.continued else []
            self.last_steps[name] = max((entry.step for entry in history), default=-1)
        return self.last_steps[name]

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Among the run's images."""
        self.client.log_image(self.id, decoded(png), key=name, step=step)

    def close(self, ended_well: bool) -> None:
        """Mark the run as finished, or as killed."""
        self.client.set_terminated(self.id, status="FINISHED" if ended_well else "KILLED")
