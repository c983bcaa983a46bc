import json

from fastmae.cli import run


def test_the_demo_compares_four_kinds_of_features_and_draws_a_self_contained_page(photos, tmp_path, capsys):
    out = tmp_path / "demo"
    args = ["demo", "--images", str(photos), "--out", str(out), "--minutes", "0.03", "--device", "cpu", "--json"]
    assert run(args) == 0
    stdout, err = capsys.readouterr()
    result = json.loads(stdout.splitlines()[-1])
    features = [row["features"] for row in result["rows"]]
    assert features == ["random init", "MAE (pixels)", "FastMAE", "teacher (efficientnet-lite0)"]
    assert 0 <= result["top1"] <= 100
    assert float(result["rows"][3]["kNN top-1 %"]) == 100.0
    assert "FastMAE" in err  # with --json, the table is on standard error
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,iVBOR") == 1
    assert page.count("<svg") == 2
    assert "http" not in page.replace("http-equiv", "")
    assert run(args) == 0  # the runs are finished: only the k-NN and the page are computed again
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == result["rows"]
