"""pytest starts a second process for marked files, and reports what happened there."""

import subprocess
import sys

import pytest

from simulated.own_process import HERE

CONFTEST = "from simulated.own_process import pytest_configure\n"
MARKED = """
import os, pytest
from importlib.metadata import entry_points

pytestmark = pytest.mark.accelerator
devices = [entry.name for entry in entry_points(group="torch.backends")]

def test_passes(): assert "sim" in devices
def test_fails(): assert "cuda" in devices
@pytest.mark.skip
def test_is_skipped(): ...
def test_crashes():
    print("last words")
    os._exit(3)
def test_runs_in_another_process(): assert "sim" in devices
"""
MARKED_TOO = """
import pytest

@pytest.fixture(scope="session")
def number():
    return 1

@pytest.mark.accelerator
def test_is_of_another_file(number): assert number == 1
"""
UNMARKED = """
from importlib.metadata import entry_points

def test_knows_no_such_device(): assert "sim" not in [entry.name for entry in entry_points(group="torch.backends")]
"""


@pytest.mark.slow
def test_only_marked_tests_run_in_a_second_process_whose_reports_and_end_are_passed_on(tmp_path):
    files = {"conftest.py": CONFTEST, "test_a.py": MARKED, "test_b.py": UNMARKED, "test_c.py": MARKED_TOO}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {HERE.parent}\nmarkers = accelerator\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--capture=no"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert "2 failed, 4 passed, 1 skipped" in ended.stdout
    for test in ("test_fails", "test_crashes"):
        assert f"FAILED test_a.py::{test}" in ended.stdout
    assert "assert 'cuda' in ['sim']" in ended.stdout
    assert "the second process has ended with code 3" in ended.stdout
