"""Weights & Biases, for `--logger wandb`. It gets a run's options, figures and pictures, and nothing else.

The package's own environment variables choose server, project, entity and mode: WANDB_MODE=offline needs neither
network nor login.
"""

import importlib
import logging
import os
import secrets
from collections.abc import Mapping
from typing import Any

from fastmae.runs.logged_run import LoggedRun, decoded, keep_ids, read_ids

log = logging.getLogger(__name__)

PROJECT = "fastmae"
DEFAULTS = {
    # What nobody has asked to be sent: errors of the package itself, the console, the machine, the code.
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_CONSOLE": "off",
    "WANDB_HOST": "",
    "WANDB_X_DISABLE_STATS": "true",
    "WANDB_X_SAVE_REQUIREMENTS": "false",
    "WANDB_X_DISABLE_META": "true",
    "WANDB_X_DISABLE_MACHINE_INFO": "true",
    "WANDB_DISABLE_GIT": "true",
    "WANDB_DISABLE_CODE": "true",
    "WANDB_SILENT": "true",
    # Seconds. Without limits, a run would wait for a network that is not there.
    "WANDB_INIT_TIMEOUT": "30",
    "WANDB_FINISH_TIMEOUT": "120",
}
"""Variables of the package, where the user has not set them."""


class WandbLogger:
    """A run at Weights & Biases, named like the run's folder. A continued run goes on there under the same id.

    Args:
        run: the run.

    Raises:
        RuntimeError: nobody is logged in.
        Exception: whatever the package raises, where there is no network, say.
    """

    def __init__(self, run: LoggedRun):
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        self.package: Any = importlib.import_module("wandb")
        online = os.environ.get("WANDB_MODE", "online") in ("online", "shared")
        if online and not self.package.login(prompt=False, verify=False):
            raise RuntimeError("nobody is logged in; run `wandb login`, or set WANDB_MODE=offline")
        known = read_ids(run.folder).wandb
        self.run = self.package.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run.folder.resolve().name),
            id=known or secrets.token_hex(4),
            resume="allow" if known else None,
            dir=os.environ.get("WANDB_DIR", str(run.folder)),
            job_type=run.task,
            config=dict(run.options),
            reinit="create_new",  # a program that trains with fastmae may have a run of its own
        )
        keep_ids(run.folder, wandb=self.run.id)
        log.info(f"--logger wandb: {self.run.url or f'{self.run.settings.sync_dir}; `wandb sync` sends it'}")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """The service drops what it already has of a step, as after a kill."""
        self.run.log(dict(values), step=step)

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Among the run's media."""
        self.run.log({name: self.package.Image(decoded(png))}, step=step)

    def close(self, ended_well: bool) -> None:
        """Send what is left."""
        self.run.finish(exit_code=0 if ended_well else 1)
