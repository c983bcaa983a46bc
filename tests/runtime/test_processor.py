"""The CPU's name, its instructions, and a container's share of it."""

import math

import pytest

from fastmae.runtime import processor


@pytest.fixture
def described(monkeypatch, tmp_path):
    """(text) -> the system describes its CPUs by it."""

    def describe(text: str) -> None:
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "cpuinfo")

    return describe


@pytest.mark.parametrize(
    ("text", "has_bf16"),
    [
        ("model name\t: A CPU\nflags\t\t: fpu avx512f avx512_bf16 sse\n", True),
        ("model name\t: A CPU\nflags\t\t: fpu avx512f\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", True),
        ("", None),
    ],
)
def test_bf16_is_told_from_the_flags_of_x86_and_arm(text, has_bf16, described):
    described(text)
    assert processor.has_bf16() is has_bf16
    assert processor.cpu_model() == "A CPU" if "A CPU" in text else processor.cpu_model()


@pytest.mark.parametrize(("text", "cores"), [("150000 100000", 1.5), ("max 100000", math.inf), ("", math.inf)])
def test_a_containers_quota_is_a_number_of_cores(text, cores, monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(processor, "CPU_QUOTA", tmp_path / "cpu.max")
    assert processor.core_quota() == cores


def test_a_system_that_describes_nothing_still_has_a_name(monkeypatch, tmp_path):
    monkeypatch.setattr(processor, "CPU_INFO", tmp_path / "none")
    monkeypatch.setattr(processor, "CPU_QUOTA", tmp_path / "none")
    assert processor.cpu_model()
    assert (processor.has_bf16(), processor.core_quota()) == (None, math.inf)
