"""Runs the tests that are marked `accelerator` in a process of their own, where torch has the device `sim`.

torch can't forget a device, so the other tests must not share a process with these. pytest starts a second pytest, asks
it for one marked test after the other, and passes its reports on as if it had run them itself. With xdist, each worker
that meets such a test has a second process.

In the second process, torch finds the device as it finds that of any vendor's package: by an entry point, in
`autoload/`. So do all processes that it starts.
"""

import contextlib
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

PIPES = "FASTMAE_TEST_PIPES"
"""Environment variable of the second process: the file descriptors that give the requests and take the reports."""
SECONDS_TO_END = 10.0
HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    pipes = os.environ.get(PIPES)
    config.pluginmanager.register(SecondProcess(config, *map(int, pipes.split())) if pipes else FirstProcess(config))


class SecondProcess:
    """Runs the tests that the first process asks for, and reports to it.

    Args:
        config: pytest's.
        requests: file descriptor from which requests are read: in each line, the ids of a test and of the next one.
        reports: file descriptor to which the reports are written. Both hold one JSON value a line.
    """

    def __init__(self, config: pytest.Config, requests: int, reports: int):
        self.config = config
        self.requests, self.reports = os.fdopen(requests), os.fdopen(reports, "w", buffering=1)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items = {item.nodeid: item for item in session.items}
        for line in self.requests:
            test, following = json.loads(line)
            item = items[test]
            # Without a following test, one of another file keeps what belongs to the whole session.
            elsewhere = next((other for other in session.items if other.path != item.path), None)
            self.config.hook.pytest_runtest_protocol(item=item, nextitem=items.get(following, elsewhere))
        session._setupstate.teardown_exact(None)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        self.reports.write(json.dumps(data) + "\n")


class FirstProcess:
    """Starts the second process when the first marked test is due.

    Args:
        config: pytest's.
    """

    def __init__(self, config: pytest.Config):
        self.config = config
        self.marked: list[str] = []
        self.run: Run | None = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        marked = list(filter(_is_marked, items))
        if marked and supported():
            self.marked = [item.nodeid for item in marked]
        for item in marked:
            item.add_marker(pytest.mark.timeout(0))  # the second process has its own limit
            if not self.marked:
                item.add_marker(pytest.mark.skip(reason="needs a torch that takes backends written in Python"))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if not self.marked or not _is_marked(item):
            return None
        if self.run is None:
            self.run = Run(self.marked, self.config.rootpath)
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for data in self.run.reports_of(item.nodeid, nextitem.nodeid if nextitem and _is_marked(nextitem) else None):
            report = self.config.hook.pytest_report_from_serializable(config=self.config, data=data)
            item.ihook.pytest_runtest_logreport(report=report)
        if self.run.output:
            report = pytest.TestReport(item.nodeid, item.location, {}, "failed", self.run.output, "call")
            item.ihook.pytest_runtest_logreport(report=report)
            self.run.end()
            self.run = None  # the next test starts another
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        # Fixtures of an earlier test were kept for this one; pytest ends here what the next one doesn't need.
        item.session._setupstate.teardown_exact(nextitem)
        return True

    def pytest_unconfigure(self) -> None:
        if self.run:
            self.run.end()


class Run:
    """The second process.

    Args:
        tests: ids of the tests that it may be asked for.
        root: pytest's root folder.

    Attributes:
        output: what the process printed, if it has ended before its time; else empty.
    """

    def __init__(self, tests: list[str], root: Path):
        (requests, requests_end), (reports_end, reports) = os.pipe(), os.pipe()
        path = [str(HERE / "autoload"), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, PIPES: f"{requests} {reports}", "PYTHONPATH": os.pathsep.join(filter(None, path))}
        for name in [name for name in environment if name.startswith("PYTEST_XDIST")]:
            del environment[name]  # it is no worker
        self.output = ""
        self.printed = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  # closed in `end`
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *tests, "-p", "no:xdist", "-p", "no:cacheprovider"],
            cwd=root,
            env=environment,
            pass_fds=[requests, reports],
            stdout=self.printed,
            stderr=subprocess.STDOUT,
        )
        os.close(requests)
        os.close(reports)
        self.requests, self.reports = os.fdopen(requests_end, "w", buffering=1), os.fdopen(reports_end)

    def reports_of(self, test: str, following: str | None) -> Iterator[dict[str, Any]]:
        """Run a test, and give the reports of its set-up, the call, and what follows.

        Args:
            test: its id.
            following: id of the test that will be asked for next; None if that isn't known.
        """
        with contextlib.suppress(BrokenPipeError):  # it has ended before its time
            self.requests.write(json.dumps([test, following]) + "\n")
        for line in self.reports:
            data = json.loads(line)
            yield data
            if data["when"] == "teardown":
                return
        code = self.process.wait()
        self.printed.seek(0)
        self.output = f"the second process has ended with code {code}:\n{self.printed.read()}"

    def end(self) -> None:
        """Ask for no more tests, and wait for the process's end."""
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()
        self.reports.close()
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
