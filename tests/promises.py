"""What is promised about faults, and how each promise is tested: docs/reliability.md shows the same table with figures.

A test of a promise is marked `@pytest.mark.promise("stores")`. One test is one case, unless it says how many it tried:
`record_property("cases", 300)`. `make test-faults` runs these tests alone, with more rounds, and prints the table.
"""

import os
from collections import Counter
from typing import Any

import pytest

PROMISES = {
    "files": "No file runs code, fetches anything, hangs a command, or fills the memory",
    "images": "An image that can't be used is skipped, counted and named",
    "values": "Pictures and tokens that say little are counted, and the command says so",
    "networks": "A stranger's weights and descriptions are checked before a network is built",
    "stores": "What `verify` calls sound can be trained on",
    "bytes": "A changed bit in a store is found",
    "remote": "A server costs no more bytes and no more time than the store's manifest allows",
    "numbers": "Every number has a range, which is checked before anything starts",
    "labels": "Boxes, masks and labels that can't be used are dropped and counted, or refused by name",
    "owner": "A folder has one writer; a second one is refused",
    "kills": "After a kill, the same call ends in the same result",
    "saved": "Work is saved before anything else can fail",
    "machine": "A full disk, too little memory and lost workers end in one line",
    "signals": "Ctrl-C and SIGTERM end every command within seconds",
}
"""Key of a promise -> the promise."""


def rounds(usual: int, thorough: int) -> int:
    """How often a random test repeats: `usual` in the whole suite, `thorough` in `make test-faults`."""
    return thorough if os.environ.get("FAULTS") == "thorough" else usual


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let each test know its promise, so that its report carries it."""
    for item in items:
        marker = item.get_closest_marker("promise")
        if marker is not None:
            (key,) = marker.args
            assert key in PROMISES, f"{item.nodeid}: no promise {key!r}"
            item.user_properties.append(("promise", key))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table, where the tests of promises were asked for."""
    if "promise" not in config.option.markexpr and rounds(0, 1) == 0:
        return
    tests: Counter[str] = Counter()
    cases: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            properties = dict(getattr(report, "user_properties", ()))
            key = properties.get("promise")
            if key is not None:
                tests[key] += 1
                cases[key] += int(properties.get("cases", 1))
                failed[key] += outcome != "passed"
    lines = ["| promise | tests | cases | failed |", "|---|---|---|---|"]
    lines += [
        f"| {text} | {tests[key]} | {cases[key]} | {failed[key]} |" for key, text in PROMISES.items() if tests[key]
    ]
    lines.append(f"| all | {tests.total()} | {cases.total()} | {failed.total()} |")
    terminalreporter.section("promises")
    for line in lines:
        terminalreporter.write_line(line)
