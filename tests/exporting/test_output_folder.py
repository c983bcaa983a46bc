"""Where an export may be written, and what it replaces."""

import json
import os
import resource

import pytest

from fastmae.cli import run
from fastmae.runtime.ownership import owned_place


def test_an_earlier_export_of_the_same_run_is_replaced_and_other_files_stay(tiny_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(["export", str(tiny_run), str(out)]) == 0
    (out / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    assert run(["export", str(tiny_run), str(out), "--image-size", "96"]) == 0
    assert json.loads((out / "config.json").read_text())["model_args"]["img_size"] == 96
    assert (out / ".gitattributes").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    capsys.readouterr()
    assert run(["export", str(tiny_run), str(out), "--format", "onnx"]) == 2
    error = capsys.readouterr().err
    assert str(out) in error
    assert "timm, not onnx" in error


def test_a_folder_or_file_that_is_not_an_export_is_left_alone(tiny_run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    thesis = tmp_path / "out" / "thesis.txt"
    thesis.write_text("years of work")
    for out in (tmp_path / "out", thesis):
        capsys.readouterr()
        assert run(["export", str(tiny_run), str(out)]) == 2
        assert str(out) in capsys.readouterr().err
    assert thesis.read_text() == "years of work"


def test_an_empty_folder_is_filled(tiny_run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert run(["export", str(tiny_run), str(tmp_path / "empty")]) == 0
    assert (tmp_path / "empty" / "model.safetensors").exists()


@pytest.mark.promise("machine")
@pytest.mark.parametrize("name", ["timm", "transformers", "onnx"])
def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(name, tiny_run, tmp_path, error_line):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))  # every write beyond it fails
    try:
        line = error_line(["export", str(tiny_run), str(tmp_path / "out"), "--format", name])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert line.startswith(f"fastmae export: {tmp_path / 'out'}: File too large; free some space")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.promise("owner")
def test_a_second_export_to_the_same_folder_is_refused_while_the_first_one_runs(tiny_run, tmp_path, error_line):
    with owned_place(tmp_path / "out", "export"):
        line = error_line(["export", str(tiny_run), str(tmp_path / "out")])
    assert f"{tmp_path / 'out'}: in use by process {os.getpid()} on " in line
    assert list(tmp_path.iterdir()) == []
