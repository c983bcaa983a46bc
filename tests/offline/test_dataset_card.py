"""The README.md of a token store."""

import re
import shlex
import shutil

import yaml

from fastmae import TokenStore
from fastmae.cli import run
from fastmae.offline.dataset_card import dataset_card, keep_card
from fastmae.runtime.cards import signed


def card_of(store):
    return (store / "README.md").read_text(encoding="utf-8")


def test_the_front_matter_is_the_hubs_and_invents_no_licence(small_store):
    _, front_matter, text = card_of(small_store).split("---\n", 2)
    entries = yaml.safe_load(front_matter)
    assert "license" not in entries
    assert entries["size_categories"] == ["n<1K"]
    assert "fastmae" in entries["tags"]
    for subject in ("images", "teacher's weights", "this store"):
        assert re.search(rf"\| licence of (the )?{subject} \| \*\*TO BE FILLED IN\*\* \|", text)


def test_it_says_what_the_store_holds_and_what_can_be_seen(small_store):
    card, info = card_of(small_store), TokenStore(small_store).info
    for fact in ("| images | 30 |", "| codec | pq16 |", info.teacher["weights_sha256"], info.images_sha256, "at 96 px"):
        assert fact in card
    assert "The images can be seen" in card
    assert info.parts[0].source not in card  # no path of the user's


def test_its_python_runs_as_it_stands(small_store, monkeypatch):
    monkeypatch.chdir(small_store)
    variables = {}
    exec(re.search(r"```python\n(.*?)```", card_of(small_store), re.DOTALL)[1], variables)
    assert variables["view"].tokens.shape == (1, 1, 192)


def test_its_command_makes_the_same_store(small_store, photos, vit_weights, tmp_path):
    command = re.search(r"```\n(fastmae tokenize .*?)```", card_of(small_store), re.DOTALL)[1]
    words = shlex.split(command.replace("\\\n", " "))[2:]
    stand_ins = {"IMAGES": str(photos / "train"), "STORE": str(tmp_path / "s"), vit_weights.name: str(vit_weights)}
    assert run(["tokenize", *(stand_ins.get(word, word) for word in words), "--workers", "0"]) == 0
    assert TokenStore(tmp_path / "s").manifest.shards == TokenStore(small_store).manifest.shards
    assert card_of(tmp_path / "s") == card_of(small_store)


def test_an_edited_card_stays_and_another_one_is_brought_up_to_date(small_store, tmp_path):
    store = shutil.copytree(small_store, tmp_path / "s.tokens")
    card = card_of(store)
    (store / "README.md").write_text(signed("of an earlier state\n"))
    keep_card(store, [TokenStore(store)])
    assert card_of(store) == card
    (store / "README.md").write_text(mine := card_of(store).replace("TO BE FILLED IN", "CC0"))
    keep_card(store, [TokenStore(store)])
    assert card_of(store) == mine


def test_a_card_of_a_url_names_it(small_store):
    card = dataset_card([TokenStore(small_store)], "s3://bucket/small.tokens")
    assert "fastmae pretrain s3://bucket/small.tokens RUN" in card
    assert 'fastmae.TokenStore("s3://bucket/small.tokens")' in card
