import json

from fastmae.cli import run
from fastmae.runs.folder import read_metrics


def test_the_demo_compares_five_kinds_of_features_and_draws_a_self_contained_page(photos, tmp_path, capsys):
    out = tmp_path / "demo"
    args = ["demo", "--images", str(photos), "--out", str(out), "--minutes", "0.03", "--device", "cpu", "--json"]
    assert run(args) == 0
    stdout, err = capsys.readouterr()
    result = json.loads(stdout.splitlines()[-1])
    features = [row["features"] for row in result["rows"]]
    assert features == [
        "random init",
        "MAE (pixels)",
        "FastMAE, the paper's",
        "FastMAE, visible patches alone",
        "teacher (efficientnet-lite0)",
    ]
    accuracies = [float(row["kNN top-1 %"]) for row in result["rows"]]
    assert round(result["top1"], 1) == accuracies[3]
    assert accuracies[4] == 100.0
    terms = [
        {key for key in read_metrics(out / run)[-1] if key.endswith("_loss")} for run in ("mae", "fastmae", "visible")
    ]
    assert terms == [{"decoder_loss"}, {"decoder_loss", "layers_loss"}, {"layers_loss", "relation_loss"}]
    assert "FastMAE" in err  # with --json, the table is on standard error
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,iVBOR") == 2
    assert page.count("<svg") == 4
    assert "http" not in page.replace("http-equiv", "")
    assert run(args) == 0  # the runs are finished: only the k-NN and the page are computed again
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == result["rows"]
