"""Windows has neither SIGUSR1 nor CPU affinity. A process of its own plays Windows on Linux."""

import subprocess
import sys

IMPORT_EVERY_MODULE = """
import contextlib, importlib, os, pkgutil, signal

del signal.SIGUSR1, os.sched_getaffinity
import fastmae
for module in pkgutil.walk_packages(fastmae.__path__, "fastmae.", onerror=lambda name: None):
    if not module.name.endswith("__main__"):  # importing it runs the command line
        with contextlib.suppress(fastmae.InputError):  # names the extra that is not installed
            importlib.import_module(module.name)

from fastmae.runtime.device import cores
from fastmae.runtime.ending import STOP_SIGNALS
from fastmae.runtime.workers import heed_only_the_parent
assert STOP_SIGNALS == (signal.SIGINT, signal.SIGTERM)
assert cores() >= 1
heed_only_the_parent(0)
"""


def test_every_module_can_be_imported_where_sigusr1_does_not_exist():
    done = subprocess.run([sys.executable, "-c", IMPORT_EVERY_MODULE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
