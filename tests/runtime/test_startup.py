"""The start of the command: Ctrl-C before anything runs, and streams that are not there."""

import random
import signal
import subprocess
import sys
import time

import pytest

from promises import rounds

PREPARED = "argparse"
"""A module that is imported once the command is prepared for signals."""


@pytest.mark.promise("signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_command_starts_ends_it_silently(number, tmp_path, record_property):
    tries = rounds(2, 12)
    record_property("cases", tries)
    # Python says on standard error what it imports, so the moment is known however busy the machine is.
    command = [sys.executable, "-X", "importtime", "-m", "fastmae", "pretrain", str(tmp_path), str(tmp_path / "run")]
    for _ in range(tries):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            lines = iter(process.stderr.readline, "")
            assert any(line.endswith(f" {PREPARED}\n") for line in lines)
            time.sleep(random.uniform(0, 1))
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        said = [line for line in err.splitlines() if not line.startswith("import time:")]
        assert (process.returncode, out, said) == (130, "", [])


def python(code, redirections):
    command = [f"exec '{sys.executable}' -c \"$0\" {redirections}", code]
    return subprocess.run(["sh", "-c", *command], check=False, capture_output=True, text=True)


@pytest.mark.promise("machine")
@pytest.mark.parametrize("redirections", ["<&- >&- 2>&-", ">&-", "2>&-"])
def test_no_file_gets_the_number_of_a_closed_stream(redirections, tmp_path):
    file = tmp_path / "file"
    code = f"""
from fastmae.runtime.startup import prepare
prepare()
import os, sys
with open({str(file)!r}, "w") as file:
    assert file.fileno() > 2
    print("for nobody", flush=True)
    print("for nobody", file=sys.stderr, flush=True)
    os.system("echo for nobody; echo for nobody >&2")  # other processes get the streams too
    file.write(f"{{file.fileno()}} is mine")
"""
    assert python(code, redirections).returncode == 0
    assert file.read_text().endswith(" is mine")


@pytest.mark.promise("machine")
@pytest.mark.parametrize("redirections", [">&- 2>&-", ">/dev/full 2>/dev/full"])
def test_a_command_that_can_say_nothing_ends_as_it_would_otherwise(redirections):
    code = "import sys; sys.argv = ['fastmae', 'recipes']; from fastmae.__main__ import main; main()"
    assert python(code, redirections).returncode == 0


@pytest.mark.promise("machine")
def test_a_result_that_cannot_be_written_is_told():
    code = "import sys; sys.argv = ['fastmae', 'recipes', '--json']; from fastmae.__main__ import main; main()"
    done = python(code, ">/dev/full")
    assert done.returncode == 2
    assert "fastmae recipes: standard output: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_that_was_ignored_from_the_start_stays_ignored():
    code = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from fastmae.runtime import startup
startup.prepare()
startup.begin()
signal.raise_signal(signal.SIGINT)
"""
    assert python(code, "").returncode == 0
