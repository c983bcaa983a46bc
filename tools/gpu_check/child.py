"""The process in which a command runs: everything is imported before it is forked."""

import importlib
import json
import os
import pkgutil
import sys
from pathlib import Path
from typing import Any

import torch

import fastmae
from fastmae.cli import run
from fastmae.pretraining.pretrain import SHARDED_BLOCKS
from fastmae.runtime import launch
from fastmae.runtime.strategy import strategy_for

NOT_IMPORTED = "fastmae.__main__"
"""Importing it runs the command line."""


def import_all() -> dict[str, str]:
    """Import every module of fastmae; returns what went wrong, by module."""
    broken = {}
    for module in pkgutil.walk_packages(fastmae.__path__, "fastmae.", onerror=lambda name: None):
        if module.name != NOT_IMPORTED:
            try:
                importlib.import_module(module.name)
            except Exception as error:  # any: that is what is looked for
                broken[module.name] = repr(error)[:300]
    return broken


BROKEN = import_all()


def call(command: list[str], output: str, group: str, threads: int) -> None:
    """Run a command and end this process with its exit code.

    Args:
        command: its arguments, as on the command line.
        output: path of the files for standard output (.out) and standard error (.err), without the ending.
        group: 'ddp' or 'fsdp': form a group of one process; '': don't.
        threads: torch's threads on the CPU; 0: as they are.
    """
    _redirect(output)
    if threads:
        torch.set_num_threads(threads)
    if group:
        form_group(group)
    sys.exit(run(command))


def tell_imports(_: list[str], output: str) -> None:
    """Write `BROKEN` to the output as JSON."""
    _redirect(output)
    print(json.dumps(BROKEN), flush=True)


def form_group(kind: str) -> None:
    """Let a single process form a group, with DDP's or FSDP's wrapper, as each of several would.

    NCCL takes no two processes on one GPU, so this is how one GPU can show that the wrappers work on NCCL.

    Args:
        kind: 'ddp' or 'fsdp'.
    """
    ungrouped: Any = launch.Fabric

    def grouped(**options: Any) -> Any:
        bf16 = options["precision"] == "bf16-mixed"
        return ungrouped(**{**options, "strategy": strategy_for(kind, 1, SHARDED_BLOCKS, bf16)})

    launch.Fabric = grouped  # type: ignore[misc, assignment]


def _redirect(output: str) -> None:
    for stream, ending in ((sys.stdout, ".out"), (sys.stderr, ".err")):
        with Path(output + ending).open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
