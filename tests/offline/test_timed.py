"""The time that tokenising takes, over several calls."""

import json

import pytest

from fastmae.config import TokenizeConfig
from fastmae.errors import InputError
from fastmae.offline.timed import tokenize_timed


def test_interrupted_calls_are_added_up_and_later_ones_are_not(photos, vit_weights, tmp_path):
    record = tmp_path / "tokenizing.json"

    def call(weights):
        options = TokenizeConfig(
            images=photos / "train",
            store=tmp_path / "s.tokens",
            teacher="timm/vit_tiny_patch16_224",
            teacher_weights=weights,
            middle_size="96",
            workers=0,
        )
        return tokenize_timed(options, record)

    with pytest.raises(InputError):
        call(tmp_path / "none.safetensors")
    begun = json.loads(record.read_text())
    assert (begun["done"], begun["seconds"] > 0) == (False, True)
    result, seconds = call(vit_weights)
    assert result["images"] == 30
    assert seconds > begun["seconds"]
    assert call(vit_weights)[1] == seconds
