"""Runs the test files that are marked `accelerator` in processes of their own, where torch has the device `sim`.

torch can't forget a device, so the other tests must not share a process with these. pytest starts a second pytest for
each such file and passes its reports on, test by test, as if it had run them itself. With xdist, give
`--dist loadfile`: it starts one process per file, and not one in each worker.

In the second process, torch finds the device as it finds that of any vendor's package: by an entry point, in
`autoload/`. So do all processes that it starts.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPORTS = "FASTMAE_TEST_REPORTS"
"""Environment variable of the second process: number of the file descriptor that takes the reports."""
SECONDS_TO_END = 10.0
HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    descriptor = os.environ.get(REPORTS)
    config.pluginmanager.register(SecondProcess(config, int(descriptor)) if descriptor else FirstProcess(config))


class SecondProcess:
    """Runs the tests and reports to the first process.

    Args:
        config: pytest's.
        descriptor: file descriptor to which the reports are written, one JSON object a line.
    """

    def __init__(self, config: pytest.Config, descriptor: int):
        self.config, self.reports = config, os.fdopen(descriptor, "w", buffering=1)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.reports.write(json.dumps(data) + "\n")


class FirstProcess:
    """Starts a process for each marked file when its first test is due.

    Args:
        config: pytest's.
    """

    def __init__(self, config: pytest.Config):
        self.config = config
        self.runs_them = False
        self.runs: dict[Path, Run] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        marked = list(filter(_is_marked, items))
        self.runs_them = bool(marked) and supported()
        for item in marked:
            item.add_marker(pytest.mark.timeout(0))  # the second process has its own limit
            if not self.runs_them:
                item.add_marker(pytest.mark.skip(reason="needs a torch that takes backends written in Python"))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if not self.runs_them or not _is_marked(item):
            return None
        if item.path not in self.runs:
            tests = [other.nodeid for other in item.session.items if other.path == item.path and _is_marked(other)]
            self.runs[item.path] = Run(tests, self.config.rootpath)
        run = self.runs[item.path]
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for data in run.reports_of(item.nodeid):
            report = self.config.hook.pytest_report_from_serializable(config=self.config, data=data)
            item.ihook.pytest_runtest_logreport(report=report)
        if run.output:
            report = pytest.TestReport(item.nodeid, item.location, {}, "failed", run.output, "call")
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        # Fixtures of an earlier test were kept for this one; pytest ends here what the next one doesn't need.
        item.session._setupstate.teardown_exact(nextitem)
        return True

    def pytest_unconfigure(self) -> None:
        for run in self.runs.values():
            run.end()


class Run:
    """The second process for one file.

    Args:
        tests: ids of the tests to run, in order.
        root: pytest's root folder.

    Attributes:
        output: what the process printed, if it has ended before its time; else empty.
    """

    def __init__(self, tests: list[str], root: Path):
        read_end, write_end = os.pipe()
        path = [str(HERE / "autoload"), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, REPORTS: str(write_end), "PYTHONPATH": os.pathsep.join(filter(None, path))}
        for name in [name for name in environment if name.startswith("PYTEST_XDIST")]:
            del environment[name]  # it is no worker
        self.output = ""
        self.printed = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # closed in `end`
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *tests, "-p", "no:xdist", "-p", "no:cacheprovider"],
            cwd=root,
            env=environment,
            pass_fds=[write_end],
            stdout=self.printed,
            stderr=subprocess.STDOUT,
        )
        os.close(write_end)
        self.lines = os.fdopen(read_end)

    def reports_of(self, test: str) -> Iterator[dict[str, Any]]:
        """The reports of the next test: of its set-up, the call, and what follows."""
        for line in self.lines:
            data = json.loads(line)
            if data["nodeid"] != test:  # another xdist worker reports it
                continue
            yield data
            if data["when"] == "teardown":
                return
        code = self.process.wait()
        self.printed.seek(0)
        self.output = f"the second process has ended with code {code}:\n{self.printed.read()}"

    def end(self) -> None:
        """Stop the process if its tests are no longer wanted, and wait for its end."""
        self.lines.close()
        try:
            self.process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGINT)
            self.process.wait()
        self.printed.close()


def supported() -> bool:
    """Whether this torch can have a device that is written in Python."""
    from torch.utils import backend_registration

    return hasattr(backend_registration, "_setup_privateuseone_for_python_backend")


def _is_marked(item: pytest.Item) -> bool:
    return item.get_closest_marker("accelerator") is not None
