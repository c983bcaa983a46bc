"""The process in which a command runs: everything is imported before it is forked."""

import importlib
import json
import os
import pkgutil
import sys
from pathlib import Path

import torch

import fastmae
from fastmae.cli import run
from fastmae.runtime import launch

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


def call(command: list[str], output: str, environment: dict[str, str], group: bool, threads: int) -> None:
    """Run a command and end this process with its exit code.

    Args:
        command: its arguments, as on the command line.
        output: path of the files for standard output (.out) and standard error (.err), without the ending.
        environment: variables to set.
        group: whether to form a group of one process.
        threads: torch's threads on the CPU; 0: as they are.
    """
    os.environ.update(environment)
    _redirect(output)
    if threads:
        torch.set_num_threads(threads)
    if group:
        form_groups()
    sys.exit(run(command))


def tell_imports(_: list[str], output: str) -> None:
    """Write `BROKEN` to the output as JSON."""
    _redirect(output)
    print(json.dumps(BROKEN), flush=True)


def form_groups() -> None:
    """Let a single process form a group, with DDP's or FSDP's wrapper, as each of several would.

    NCCL takes no two processes on one GPU, so this is how one GPU can show that the wrappers work on NCCL.
    """
    strategy, sharded = launch._strategy, launch.ModelParallelStrategy
    launch._strategy = lambda name, world_size, *rest: strategy(name, 2, *rest)
    launch.ModelParallelStrategy = lambda shard, **sizes: sharded(shard, **{**sizes, "data_parallel_size": 1})  # type: ignore


def _redirect(output: str) -> None:
    for stream, ending in ((sys.stdout, ".out"), (sys.stderr, ".err")):
        with Path(output + ending).open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
