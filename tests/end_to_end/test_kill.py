"""Runs and stores that are killed at any moment, and continued to the result of one that was not."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fastmae.runs.checkpoint import load_checkpoint
from fastmae.runs.folder import CHECKPOINT_FILE, read_evaluations, read_metrics


def start(command, args):
    """Start a command that starts further ones by its own command line; the others are forks, which start sooner."""
    return subprocess.Popen(
        [*command, *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process, timeout=250):
    """The process's output, once it has ended with exit code 0."""
    out, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, out
    return out


def wait_until(ready, process, timeout=120):
    end = time.monotonic() + timeout
    while not ready() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)


def signal_when(ready, process, number):
    """Send a signal at a random moment after `ready()`; returns the exit code."""
    wait_until(ready, process)
    time.sleep(random.uniform(0, 0.4))
    if process.poll() is None and number == signal.SIGINT:
        os.killpg(process.pid, number)  # Ctrl-C reaches the loading processes too
    elif process.poll() is None:
        os.kill(process.pid, number)
    return process.wait(120)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def tokenize_args(photos, vit_teacher, tmp_path):
    """The arguments that make `vit_store` again, in `tmp_path / "s"`."""
    options = "--middle-size 96 --shard-size 8 --codec fp32 --pixels raw --workers 1".split()
    return ["tokenize", str(photos / "train"), str(tmp_path / "s"), *vit_teacher, *options]


@pytest.mark.promise("kills")
def test_a_store_that_is_killed_while_it_is_written_ends_in_the_same_bytes(tokenize_args, vit_store, warm, tmp_path):
    def shards():
        return len(list((tmp_path / "s").glob("shards/*.safetensors"))) if (tmp_path / "s").exists() else -1

    def grows_beyond(count):
        return lambda: shards() > count

    for number, exit_code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        ready = grows_beyond(shards())
        assert signal_when(ready, warm.start(tokenize_args, tmp_path / "log.txt"), number) in (0, exit_code)
    warm.start(tokenize_args, tmp_path / "log.txt").finish()
    assert contents(tmp_path / "s") == contents(vit_store)


def test_two_processes_fill_one_store_to_the_same_bytes(tokenize_args, vit_store, warm, tmp_path):
    ranks = [[*tokenize_args, "--world-size", "2", "--rank", str(rank)] for rank in range(2)]
    for process in [warm.start(args, tmp_path / "log.txt") for args in ranks]:
        process.finish()
    assert contents(tmp_path / "s") == contents(vit_store)


@pytest.fixture(scope="module")
def options(tiny_student):
    """The options of a run of 38 steps that saves after each step and logs every third one."""
    return [*tiny_student, *"--epochs 10 --workers 1 --save-every 0 --log-every 3".split()]


@pytest.fixture
def run_folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def pretrain_args(vit_store, options, run_folder):
    return ["pretrain", str(vit_store), str(run_folder), *options]


@pytest.fixture(scope="module")
def unbroken(vit_store, options, warm, tmp_path_factory):
    """The log of the run by one process without an interruption."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    warm.start(["pretrain", str(vit_store), str(folder), *options], folder.parent / "log.txt").finish()
    return read_metrics(folder)


def assert_same(entries, expected, tolerance=1e-6):
    assert [entry["step"] for entry in entries] == [entry["step"] for entry in expected]
    assert [entry["loss"] for entry in entries] == pytest.approx([entry["loss"] for entry in expected], abs=tolerance)
    assert [entry["lr"] for entry in entries] == pytest.approx([entry["lr"] for entry in expected], abs=1e-12)


SUMMATION = 2e-5
"""Difference of the losses after 38 steps if several processes sum in another order."""


@pytest.mark.promise("kills")
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_a_run_that_is_stopped_and_continued_reaches_the_same_losses(
    number, exit_code, pretrain_args, run_folder, unbroken, warm, tmp_path
):
    process = warm.start(pretrain_args, tmp_path / "log.txt")
    assert signal_when(lambda: len(read_metrics(run_folder)) >= 3, process, number) == exit_code
    assert 3 <= len(read_metrics(run_folder)) < len(unbroken)
    assert "from step" in warm.start(pretrain_args, tmp_path / "second.txt").finish()
    assert_same(read_metrics(run_folder), unbroken)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_schedulers_signal_saves_and_stops_the_run_like_ctrl_c(
    number, pretrain_args, run_folder, unbroken, warm, tmp_path
):
    process = warm.start(pretrain_args, tmp_path / "log.txt")
    assert signal_when(lambda: len(read_metrics(run_folder)) >= 3, process, number) == 130
    assert 0 < load_checkpoint(run_folder / CHECKPOINT_FILE)["step"] < unbroken[-1]["step"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_devices_reach_the_losses_of_one_on_the_same_batches(
    strategy, pretrain_args, run_folder, unbroken, fastmae_command
):
    args = [*pretrain_args, "--devices", "2", "--strategy", strategy, "--knn-every", "5"]
    finish(start(fastmae_command, args))
    assert_same(read_metrics(run_folder), unbroken, SUMMATION)  # so the k-NN measurements have changed nothing
    evaluations = read_evaluations(run_folder)
    assert [entry["step"] for entry in evaluations] == [19, 38]
    assert all(0 <= entry["knn_top1"] <= 100 for entry in evaluations)


def test_two_processes_of_torchrun_reach_the_losses_of_one(pretrain_args, run_folder, unbroken, fastmae_command):
    torchrun = [fastmae_command[0], *"-m torch.distributed.run --standalone --nproc-per-node 2 -m fastmae".split()]
    finish(start(torchrun, pretrain_args))
    assert_same(read_metrics(run_folder), unbroken, SUMMATION)


def test_two_tasks_of_srun_reach_the_losses_of_one(pretrain_args, run_folder, unbroken, warm, tmp_path):
    variables = {
        "JOB_ID": str(os.getpid()),
        "JOB_NAME": "train",
        "NNODES": "1",
        "NTASKS": "2",
        "NTASKS_PER_NODE": "2",
        "NODELIST": "localhost",
        "NODEID": "0",
        "STEP_NUM_TASKS": "2",
        "STEP_TASKS_PER_NODE": "2",
    }
    task = {f"SLURM_{name}": value for name, value in variables.items()}
    tasks = [
        warm.start(pretrain_args, tmp_path / f"{rank}.txt", task | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank})
        for rank in ("0", "1")
    ]
    _, second_output = [task.finish() for task in tasks]
    assert second_output == ""  # only the first process prints
    assert_same(read_metrics(run_folder), unbroken, SUMMATION)


@pytest.mark.promise("kills")
def test_if_one_of_two_processes_is_killed_the_other_ends_and_the_run_can_be_continued(
    pretrain_args, run_folder, unbroken, fastmae_command
):
    args = [*pretrain_args, "--devices", "2"]
    process = start(fastmae_command, args)
    wait_until(lambda: len(read_metrics(run_folder)) >= 5, process)
    os.kill(second_process_of(process), signal.SIGKILL)
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 1, out
    assert "process 2 of 2" in out
    assert "Traceback" not in out
    finish(start(fastmae_command, args))
    assert_same(read_metrics(run_folder), unbroken, SUMMATION)


def second_process_of(process):
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        command, environment = (Path(f"/proc/{child}/{name}").read_bytes() for name in ("cmdline", "environ"))
        if b"pretrain" in command and b"LOCAL_RANK=1" in environment:
            return int(child)
    raise AssertionError(f"no second process among {children}")


def test_damage_that_only_the_second_process_meets_is_reported_once(
    vit_store, options, run_folder, flip_in_record, fastmae_command, tmp_path
):
    store = shutil.copytree(vit_store, tmp_path / "s")
    flip_in_record(store, 1, 2)  # with this seed, the second process reads this image
    process = start(fastmae_command, ["pretrain", str(store), str(run_folder), *options, "--devices", "2"])
    out, _ = process.communicate(timeout=150)
    assert process.returncode == 2, out
    assert out.count("image 2 are damaged") == 1
    assert "process 2 of 2" in out
    assert "Traceback" not in out
