"""The model card of an export."""

import json

import numpy as np
import transformers
import yaml

import fastmae
from fastmae.exporting.model_card import _escape_cells

CLOSE = {"rtol": 0, "atol": 1e-4}


def test_the_cards_code_runs_as_it_stands(exports, images, tokens, run_card):
    transformers.utils.logging.disable_progress_bar()
    expected = tokens[:, 1:].mean(1)
    for name, batch in {"timm": images, "transformers": images, "onnx": images.numpy()}.items():
        variables = run_card(exports[name], batch)
        np.testing.assert_allclose(variables["embedding" if name == "onnx" else "features"], expected, **CLOSE)


def test_the_card_says_where_the_weights_come_from_without_paths(exports, tiny_run):
    store = json.loads((tiny_run / "run.json").read_text())["store"]
    last = json.loads((tiny_run / "metrics.jsonl").read_text().splitlines()[-1])
    for name, folder in exports.items():
        card = (folder / "README.md").read_text(encoding="utf-8")
        front_matter = yaml.safe_load(card.split("---\n")[1])
        assert front_matter["library_name"] == name
        assert front_matter["pipeline_tag"] == "image-feature-extraction"
        assert "fastmae" in front_matter["tags"]
        for fact in (
            store["images_sha256"],
            store["teachers"][0]["spec"],
            store["teachers"][0]["weights_sha256"],
            f"| loss | {last['loss']:.4g} |",
            "| steps | 8 |",
            "| epochs | 2 |",
            f"fastmae {fastmae.__version__}",
            "## Licence",
        ):
            assert fact in card.replace("\n", " ")
        assert str(tiny_run.parent) not in card
        description = (folder / "fastmae.json").read_text().replace(f'"source": "{tiny_run}"', "")
        assert str(tiny_run.parents[1]) not in description


def test_a_bar_or_a_line_break_in_a_value_does_not_break_its_table_row():
    facts = {"Images": {"name": "a|b\nc"}}
    assert _escape_cells(facts) == {"Images": {"name": "a\\|b c"}}
