"""A study's tables and page, from its study.json."""

import json

import pytest

from fastmae.errors import InputError
from fastmae.reporting.study_page import STUDY_FILE, read_study, study_text, write_study_page

METRICS = ("knn", "linear", "finetune")


def row(arm, **given):
    figures = {}
    for metric in METRICS:
        figures |= {
            metric: 43.21,
            f"{metric}_std": 1.25,
            f"{metric}_difference": 2.5,
            f"{metric}_interval": [-1.5, 6.5],
        }
    shared = {"data": "photos", "teacher": "vit", "seeds": 3, "gflops_per_image": 0.1795, "seconds": 118.6, "note": ""}
    return {"arm": arm, **figures, **shared, **given}


def study_of(*rows, metrics=METRICS, split="val", **given):
    names = {each["arm"]: {"options": {"loss": "mse"}, "candidates": [], "share": 1.0, "note": ""} for each in rows}
    return {
        "fastmae study": 1,
        "title": "A study <of> losses",
        "study": "mine.yaml",
        "machine": {"CPU": "some"},
        "split": split,
        "protocol": "Measured somewhere.",
        "metrics": list(metrics),
        "baseline": rows[0]["arm"],
        "seeds": [0, 1, 2],
        "epochs": 3,
        "seconds": None,
        "base": {},
        "tokenize": {},
        "teachers": {"vit": {"teacher": "timm/x"}, "both": ["vit", "cnn"]},
        "finetune": None,
        "data": {"photos": {"path": "photos", "train": 3}},
        "arms": names,
        "rows": list(rows),
        "tuning": [],
        "failures": [],
        **given,
    }


def test_the_table_holds_means_deviations_and_intervals():
    text = study_text(study_of(row("paper"), row("cosine")))
    assert "43.2 ± 1.2" in text
    assert "+2.5 ± 4.0" in text
    assert "0.179" in text or "0.18" in text
    assert "photos, teacher vit (val/)" in text
    assert "'paper'" in text


def test_no_table_is_wider_than_120_columns_and_a_note_that_does_not_fit_goes_below():
    arms = [row("an arm with a name that is far too long for a table", note="84.5 (ViT-B, 300 epochs)"), row("b")]
    text = study_text(study_of(*arms))
    table = [line for line in text.splitlines() if "43.2" in line]
    assert max(map(len, table)) <= 120
    assert any(line.startswith("an arm") and line.endswith("84.5 (ViT-B, 300 epochs)") for line in text.splitlines())
    narrow = study_text(study_of(*arms, metrics=("knn",)))
    assert any("43.2" in line and line.endswith("84.5 (ViT-B, 300 epochs)") for line in narrow.splitlines())


def test_missing_figures_and_seeds_are_shown_as_such():
    empty = {f"{metric}{end}": None for metric in METRICS for end in ("", "_std", "_difference", "_interval")}
    text = study_text(study_of(row("a"), row("b", **empty, seeds=0, seconds=None, gflops_per_image=None)))
    (line,) = [line for line in text.splitlines() if line.startswith("b ")]
    assert line.split()[1:] == ["0", *8 * ["-"]]


def test_the_page_shows_bars_with_whiskers_tuning_failures_and_settings(tmp_path):
    tuning = [
        {
            "data": "photos",
            "teacher": "vit",
            "arm": "b",
            "chosen": {"base_lr": 0.01},
            "candidates": [{"options": {"base_lr": 0.01}, "knn": 41.0}, {"options": {"base_lr": 9}}],
        }
    ]
    failures = [{"arm": "b", "seed": 1, "message": "the device is out of memory"}]
    page = tmp_path / "study.html"
    headings = write_study_page(study_of(row("a"), row("b"), tuning=tuning, failures=failures), page)
    html = page.read_text()
    assert headings[0] == "photos, teacher vit (val/)"
    assert html.count("<svg") == len(METRICS)
    assert "A study &lt;of&gt; losses" in html
    assert "base_lr 0.01" in html
    assert "diverged" in html
    assert "out of memory" in html
    assert "vit and cnn" in html


def test_held_out_figures_are_named_as_such(tmp_path):
    assert "held-out fifth" in study_text(study_of(row("a"), split="held-out"))


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"a": 1})])
def test_a_file_that_is_no_study_is_refused(content, tmp_path):
    (tmp_path / STUDY_FILE).write_text(content)
    with pytest.raises(InputError, match=r"study\.json"):
        read_study(tmp_path)
