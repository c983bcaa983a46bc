"""The GPU check: it passes at toy size without a GPU, and says what failed, what was left out and what to send."""

import importlib
import json
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch

from fastmae.config.commands import COMMANDS

TOOLS = Path(__file__).parents[2] / "tools"
STAGES = "imports,inputs,correctness,inside,groups,speed"
"""The commands have end-to-end tests of their own."""
CALLED_BY_OTHER_STAGES = {"tokenize", "pretrain", "bench step"}


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch):
    """The name of a module of the check -> the module."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return lambda name: importlib.import_module(f"gpu_check.{name}")


@pytest.fixture
def setting(gpu_check, tmp_path):
    """A toy setting; `setting.commands.submit` gives the outcomes of `setting.commands.outcomes`, by run folder."""
    commands = SimpleNamespace(outcomes={})

    def submit(arguments: list[str], *_: Any, **__: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        future.set_result(commands.outcomes[Path(arguments[2]).name])
        return future

    commands.submit = submit
    module = gpu_check("setting")
    return module.Setting("cpu", module.TOY, tmp_path, time.monotonic() + 600, commands)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_check_passes_at_toy_size(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(TOOLS / "gpu_check"), "--cpu", "--stages", STAGES, "--out", str(out)]
    # torch.compile then does nothing: the C++ compiler takes a minute for each of five students.
    environment = {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [*command, "--budget", "550"], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    found = json.loads((out / "gpu_check.json").read_text())
    assert [check for check in found["checks"] if not check["passed"]] == []
    assert done.returncode == 0, done.stderr
    assert [part["name"] for part in found["left_out"]] == ["host syncs, kernels"]
    assert list(found["stage_seconds"]) == STAGES.split(",")
    names = {check["name"] for check in found["checks"]}
    assert {"ddp in a group of one", "deterministic, stopped and continued"} <= names
    markdown = (out / "gpu_check.md").read_text()
    assert f"\n{markdown}\n" in done.stdout
    assert done.stdout.splitlines()[-1] == f"Written: {out / 'gpu_check.md'}, {out / 'gpu_check.json'}"
    for row in ("| speed | vit_base_60ep, pq38, batch 8, compiled: with the loader |", "| >= 10,000 |", "| >= 1.90 |"):
        assert row in markdown
    for name, version in (("torch", torch.__version__), ("timm", timm.__version__)):
        assert f"- {name}: {version}" in markdown
    assert "- card: none" in markdown
    assert "- CPU: " in markdown


def test_each_command_is_called(gpu_check):
    commands = gpu_check("every_command")
    lines = [*commands.COMMANDS.values(), *commands.STUDIES.values()]
    called = {name for name in COMMANDS for line in lines if f"{line} ".startswith(f"{name} ")}
    assert called | CALLED_BY_OTHER_STAGES == {*COMMANDS}


def test_a_failure_says_what_was_expected_and_what_to_send(gpu_check, tmp_path, monkeypatch, capsys):
    main = gpu_check("main")

    def broken(_, report) -> None:
        report.check("the answer", False, "42", "41", "fastmae answer")
        raise RuntimeError("no such card")

    stages = {
        "broken": main.Stage(broken, 1),
        "good": main.Stage(good, 1),
        "dependent": main.Stage(good, 1, ("broken",)),
    }
    monkeypatch.setattr(main, "STAGES", stages)
    assert main.main(["--cpu", "--out", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "FAIL the answer: expected 42; seen: 41" in output
    assert "FAIL broken ends: expected no error; seen: RuntimeError('no such card')" in output
    assert output.count("PASS the question: seven") == 1
    assert "LEFT OUT dependent: needs broken" in output
    assert "FAIL: the answer; broken ends. Please open an issue" in output
    for file in ("gpu_check.md", "gpu_check.json"):
        assert str(tmp_path / file) in output
        assert (tmp_path / file).exists()
    details = [check["details"] for check in json.loads((tmp_path / "gpu_check.json").read_text())["checks"]]
    assert details[0] == "fastmae answer"
    assert "Traceback" in details[1]
    assert "| broken | the answer | **FAIL** | 42 | 41 |" in (tmp_path / "gpu_check.md").read_text()


def good(_, report) -> None:
    report.check("the question", True, "six", "seven")


def test_a_small_budget_says_what_is_left_out(gpu_check, tmp_path, capsys):
    main = gpu_check("main")
    assert main.main(["--cpu", "--budget", "2", "--stages", "inputs,correctness", "--out", str(tmp_path)]) == 0
    assert "LEFT OUT inputs: 2 s left, 3 s needed" in capsys.readouterr().out
    markdown = (tmp_path / "gpu_check.md").read_text()
    assert "0 of 0 checks passed" in markdown
    assert "Left out: inputs; correctness." in markdown
    assert "| correctness | needs inputs |" in markdown


def test_a_stage_that_hangs_is_ended(gpu_check, tmp_path, monkeypatch, setting):
    main = gpu_check("main")
    report = gpu_check("report").Report(tmp_path)
    monkeypatch.setattr(main, "GRACE", 0.1)
    late = main.Setting("cpu", setting.sizes, tmp_path, time.monotonic(), setting.commands)
    before = signal.getsignal(signal.SIGALRM)
    main.run_stages({"hangs": main.Stage(lambda *_: time.sleep(60), -1)}, late, report)
    assert [check.name for check in report.failed] == ["hangs ends"]
    assert signal.getsignal(signal.SIGALRM) is before


def test_without_a_gpu_only_toy_sizes_are_tried(gpu_check, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check("main").main(["--out", str(tmp_path / "out")]) == 2
    assert "--cpu" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_an_unknown_stage_is_refused(gpu_check, capsys):
    with pytest.raises(SystemExit):
        gpu_check("main").main(["--cpu", "--stages", "sped"])
    assert "no stage 'sped'" in capsys.readouterr().err


@pytest.mark.parametrize(("bf16", "passed"), [(1.02, True), (1.04, False)])
def test_losses_that_differ_too_much_fail(bf16, passed, gpu_check, setting, tmp_path):
    outcome, report = gpu_check("commands").Outcome, gpu_check("report").Report(tmp_path / "out")
    first = {"cpu": 1.0, "32-true": 1.0, "tf32": 1.0, "bf16-mixed": bf16, "micro-batches": 1.0, "compiled": 1.0}
    curves = first | dict.fromkeys(("run", "again", "stopped", "deterministic", "deterministic-stopped"), 3.0)
    for name, loss in curves.items():
        run = tmp_path / "run" if name == "run" else tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text(5 * f'{{"loss": {loss}}}\n')
        setting.commands.outcomes[name] = outcome([], 0)
    setting.commands.run = lambda _: outcome([], 0)
    gpu_check("correctness").correctness(setting, report)
    failed = {check.name for check in report.failed}
    never_stopped = {"stopped by SIGTERM", "deterministic, stopped by SIGTERM"}
    assert failed == never_stopped | (set() if passed else {"first losses, bf16-mixed and the CPU"})


def test_the_benches_figures_stand_beside_their_goals(gpu_check, setting, tmp_path):
    outcome, report = gpu_check("commands").Outcome, gpu_check("report").Report(tmp_path / "out")
    row = {"method": "FastMAE", "images_per_second": 5786.0, "memory_mb": 8400, "times_mae": 2.1}
    counted = {"kernels": 2260, "bytes_per_image": 264e6, "flops_per_image": 31e9}
    setting.commands.run = lambda call: outcome(call, 0, counted if "--count" in call else {"rows": [row]})
    benches = gpu_check("benches")
    benches.bench_step(setting, report)
    benches.bench_count(setting, report)
    found = {figure.name: (figure.value, figure.reached) for figure in report.figures}
    assert found["bench step, FastMAE"] == (5786.0, None)
    assert found["bench step, FastMAE: times MAE"] == (2.1, None)
    assert found["kernels of a step, by count"] == (2260, False)
    assert found["memory traffic by count"] == (264.0, False)
    assert found["operations by count"] == (31.0, None)


def test_curves_of_different_lengths_are_never_near(gpu_check):
    apart = gpu_check("correctness").apart
    assert apart([2.0, 4.0], [2.0, 5.0]) == 0.25
    assert apart([1.0, 2.0], [1.0]) == apart([], []) == float("inf")


def test_a_goal_that_is_missed_is_no_failed_check(gpu_check, tmp_path):
    module = gpu_check("report")
    report = module.Report(tmp_path)
    report.begin("speed")
    report.figure("fast", 12_345.6, "views/s", module.Goal(10_000))
    report.figure("kernels", 901, "", module.Goal(900, at_most=True))
    assert report.failed == []
    markdown = report.markdown()
    assert "| speed | fast | 12,346 views/s | >= 10,000 | reached |" in markdown
    assert "| speed | kernels | 901 | <= 900 | short |" in markdown
    assert "1 of 2 goals reached" in markdown


def test_a_missing_package_is_no_fault(gpu_check, tmp_path):
    outcome, report = gpu_check("commands").Outcome, gpu_check("report").Report(tmp_path)
    tell = gpu_check("every_command").tell
    tell(report, "detect", outcome(["detect"], 2, said="fastmae detect: pip install 'fastmae[detect]'\n"))
    tell(report, "knn", outcome(["knn"], 2, said="fastmae knn: no such run\n"))
    tell(report, "linear", outcome(["linear"], None))
    assert [part.name for part in report.left_out] == ["detect"]
    assert [check.seen for check in report.checks] == ["exit code 2: fastmae knn: no such run", "no end after 300 s"]
