import json

from fastmae.cli import run


def test_a_table_is_run_row_by_row_and_goes_on_where_it_was(photos, tmp_path, capsys):
    out = tmp_path / "ablations"
    args = [
        "ablate",
        "targets",
        str(photos),
        "--out",
        str(out),
        "--epochs",
        "1",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--json",
    ]
    assert run(args) == 0
    stdout, err = capsys.readouterr()
    rows = json.loads(stdout.splitlines()[-1])["rows"]
    assert [row["row"] for row in rows] == ["MAE, pixels", "HOG", "FastMAE, stored tokens", "FastMAE, online teacher"]
    assert all(0 <= row["knn"] <= 100 and 0 <= row["linear"] <= 100 and row["seconds"] > 0 for row in rows)
    assert rows[2]["paper"].startswith("84.3")
    assert "Table 2" in err
    page = (out / "targets.html").read_text()
    assert page.count("<svg") == 2

    lost = out / "targets" / "HOG-seed0.json"
    lost.unlink()  # as after a kill between a run's end and its measure
    kept = (out / "targets" / "MAE__pixels-seed0" / "checkpoint.pt").stat().st_mtime_ns
    assert run(args) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == rows
    assert lost.exists()
    assert (out / "targets" / "MAE__pixels-seed0" / "checkpoint.pt").stat().st_mtime_ns == kept
    assert run([*args, "--epochs", "2"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_what_a_table_can_not_take_is_one_line(photos, tmp_path, capsys):
    out = ["--out", str(tmp_path / "a")]
    assert run(["ablate", "tricks", str(photos), *out, "--teacher", "efficientnet-lite0,efficientnet-lite2"]) == 2
    assert "go with the table teachers" in capsys.readouterr().err
    assert run(["ablate", "encoders", str(photos), *out, "--recipe", "vit_base_60ep"]) == 2
    assert "names a depth, a width and heads" in capsys.readouterr().err
    assert run(["ablate", "encoder", str(photos), *out]) == 2
    assert run(["ablate", "tricks", str(photos / "train"), *out]) == 2
    assert not (tmp_path / "a").exists()


def test_one_class_is_refused_before_anything_is_made(photos, tmp_path, capsys):
    for split in ("train", "val"):
        (tmp_path / "one" / split).mkdir(parents=True)
        (tmp_path / "one" / split / "china").symlink_to(photos / split / "china")
    assert run(["ablate", "tricks", str(tmp_path / "one"), "--out", str(tmp_path / "a")]) == 2
    assert "has one class" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
