"""`fastmae doctor`: what it sees, what it says to change, and that it never fails."""

import json
import logging
import math
import sys

import pytest
import torch

import fastmae
from fastmae.cli import run
from fastmae.runtime import doctor, memory, packages, processor

KEYS = ("ok", "versions", "cpu", "memory", "open_files", "disk", "devices", "extras", "findings")


@pytest.fixture
def findings():
    """() -> the findings of a call: level, and what with its way out."""
    return lambda **options: {
        f"{found['what']}; {found['way_out']}": found["level"] for found in fastmae.doctor(**options)["findings"]
    }


def level_of(findings: dict[str, str], text: str) -> str | None:
    return next((level for line, level in findings.items() if text in line), None)


def test_it_prints_versions_devices_and_memory_and_its_json_has_the_documented_keys(printed_json, capsys):
    assert run(["doctor", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert tuple(result) == KEYS
    assert (result["ok"], result["versions"]["torch"]) == (True, packages.version_of("torch"))
    assert result["memory"]["total"] > result["memory"]["available"] > 0
    assert result["cpu"]["cores"] >= 1
    assert result["disk"]["free"] > 0


def test_what_people_read_names_each_finding_with_its_way_out(monkeypatch, caplog):
    monkeypatch.setattr(memory, "most_handles", lambda: 256)
    fastmae.doctor()
    text = caplog.records[-1].getMessage()
    assert "1 to change:" in text
    assert "advice: a process may open 256 files, which limits the loading workers; ulimit -n 65536" in text


def test_a_healthy_machine_has_nothing_to_change(findings, monkeypatch):
    monkeypatch.setattr(memory, "most_handles", lambda: 1 << 20)
    monkeypatch.setattr(memory, "available", lambda: 64 << 30)
    monkeypatch.setattr(processor, "core_quota", lambda: math.inf)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage(1 << 40))
    assert {*findings().values()} <= {"information"}


@pytest.mark.parametrize(
    ("change", "level", "text"),
    [
        (lambda p: p.setattr(doctor.shutil, "disk_usage", lambda _: usage(64 << 20)), "advice", "--shm-size 8g"),
        (lambda p: p.setattr(doctor.shutil, "disk_usage", lambda _: usage(1 << 30)), "advice", "--codec pq38"),
        (lambda p: p.setattr(memory, "most_handles", lambda: 256), "advice", "ulimit -n 65536"),
        (lambda p: p.setattr(memory, "available", lambda: 1 << 30), "advice", "1.1 GB of memory are free"),
        (lambda p: p.setattr(processor, "core_quota", lambda: 0.5), "advice", "set OMP_NUM_THREADS=1"),
        (lambda p: p.setattr(processor, "has_bf16", lambda: True), "information", "--precision bf16-mixed"),
        (lambda p: p.setattr(processor, "has_bf16", lambda: False), "information", "emulates bf16"),
        (lambda p: p.setattr(packages, "SHOWN", ("no-such-package",)), None, "no-such-package"),
        (lambda p: p.setattr(packages.metadata, "version", lambda _: "0.1"), "problem", "pip install 'timm"),
        (lambda p: p.setattr(packages.metadata, "version", absent), "problem", "torch is not installed"),
        (lambda p: p.setattr(packages.metadata, "version", absent), "information", "detect (pycocotools)"),
        (lambda p: p.setattr(packages.metadata, "metadata", absent), "information", "without having been installed"),
        (lambda p: p.setitem(sys.modules, "torchvision", None), "problem", "torchvision can't be imported"),
        (lambda p: p.setattr(doctor, "device_count", lambda kind: kind == "mps"), "problem", "mps:0 can't compute"),
    ],
)
def test_each_finding_says_what_to_do(change, level, text, findings, monkeypatch):
    change(monkeypatch)
    assert level_of(findings(), text) == level


def usage(size: int):
    return type("Usage", (), {"total": size, "free": size})


def absent(_: str):
    raise packages.metadata.PackageNotFoundError


@pytest.mark.parametrize(
    ("variables", "cuda", "text"),
    [
        ({"CUDA_VISIBLE_DEVICES": ""}, "12.8", "CUDA_VISIBLE_DEVICES='' hides the GPU; unset it"),
        ({}, None, "is built without CUDA; install the torch that is built for CUDA"),
        ({}, "12.8", "is built for CUDA 12.8 and can't use the GPU"),
    ],
)
def test_a_gpu_that_torch_cant_use_is_a_problem_with_its_cause(variables, cuda, text, findings, monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(doctor, "NVIDIA", (tmp_path,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert level_of(findings(), text) == "problem"


def test_a_device_that_is_asked_for_and_not_there_is_a_problem(findings):
    assert level_of(findings(device="cuda:99"), "--device cuda:99: not available") == "problem"
    assert level_of(findings(device="abacus"), "--device abacus: unknown") == "problem"
    assert level_of(findings(device="cpu"), "--device") is None


QUESTIONS = [
    (processor, "cpu_model"),
    (processor, "core_quota"),
    (memory, "available"),
    (memory, "total"),
    (memory, "most_handles"),
    (packages, "versions"),
    (packages, "unmet"),
    (packages, "extras"),
    (doctor, "cores"),
    (doctor, "device_count"),
    (doctor.shutil, "disk_usage"),
]


@pytest.mark.parametrize(("module", "name"), QUESTIONS, ids=[name for _, name in QUESTIONS])
def test_whatever_cant_be_asked_is_said_and_the_rest_is_shown(module, name, findings, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("an odd machine")

    monkeypatch.setattr(module, name, fail)
    assert level_of(findings(), "can't be told (RuntimeError: an odd machine)") == "information"
    assert "versions" in caplog.records[-1].getMessage()
    assert logging.getLogger("fastmae").level <= logging.INFO


def test_figures_that_are_not_known_are_none(monkeypatch):
    monkeypatch.setattr(memory, "most_handles", lambda: math.inf)
    monkeypatch.setattr(memory, "total", lambda: None)
    result = fastmae.doctor()
    assert (result["open_files"], result["memory"]["total"]) == (None, None)


@pytest.mark.accelerator
def test_an_accelerator_of_any_kind_is_listed_and_multiplies():
    result = fastmae.doctor(device="sim")
    assert [device["name"] for device in result["devices"]] == ["sim:0"]
    assert result["ok"], result["findings"]
