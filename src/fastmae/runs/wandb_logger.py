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
ERROR_REPORTING = "WANDB_ERROR_REPORTING"
"""Whether the package reports its own errors; it reads this variable alone."""
SETTINGS: dict[str, Any] = {
    # What nobody has asked to be sent: the console, the machine, the code.
    "console": "off",
    "host": "",
    "x_disable_stats": True,
    "x_save_requirements": False,
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "disable_git": True,
    "disable_code": True,
    "silent": True,
    # Seconds. Without limits, a run would wait for a network that is not there.
    "init_timeout": 30,
    "finish_timeout": 120,
}
"""Settings of a run, where the user has not set their variables (WANDB_CONSOLE, say). They are given to the run itself:
the package reads its variables once, and a program may have used it before."""


class WandbLogger:
    """A run at Weights & Biases, named like the run's folder. A continued run goes on there under the same id.

    Args:
        run: the run.

    Raises:
        RuntimeError: nobody is logged in.
        Exception: whatever the package raises, where there is no network, say.
    """

    def __init__(self, run: LoggedRun):
        os.environ.setdefault(ERROR_REPORTING, "false")
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
            mode=os.environ.get("WANDB_MODE"),
            settings={name: value for name, value in SETTINGS.items() if f"WANDB_{name.upper()}" not in os.environ},
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
