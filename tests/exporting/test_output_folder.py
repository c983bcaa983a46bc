"""Where an export may be written, and what it replaces."""

import json

from fastmae.cli import run


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
