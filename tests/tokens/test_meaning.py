"""`fastmae verify` means what it says: a store that passes can be trained on, whatever was done to it."""

import json
import math
import shutil
import time
from random import Random

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fastmae.cli import run
from fastmae.errors import InputError
from fastmae.tokens.reader import open_scales
from promises import rounds
from tokens.edited_store import KINDS, PATCH, EditedStore, build
from tokens.edits import EDITS, apply

pytestmark = pytest.mark.promise("stores")
STUDENT = (
    "--encoder vit_tiny_patch16_224 --encoder-depth 1 --encoder-width 32 --encoder-heads 1 --decoder-width 32 "
    "--decoder-heads 1 --batch-size 8 --epochs 2 --warmup-epochs 0 --log-every 1 --device cpu --workers 0 --json"
).split()
ROUNDS = rounds(25, 300)
SECONDS = 20
"""What no edit may cost."""


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A store of each kind, in a few milliseconds."""
    folder = tmp_path_factory.mktemp("kinds")
    return {kind: build(folder / str(number), kind) for number, kind in enumerate(KINDS)}


def outcome(capsys, args):
    """Exit code and JSON of a command that ends in a line, not in a traceback."""
    capsys.readouterr()
    code = run(args)
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    if code:
        assert code in (1, 2)
        assert err.splitlines()[-1].startswith(f"fastmae {args[0]}: ")
    return code, json.loads(out.splitlines()[-1]) if out else {}


def trains(capsys, store, folder):
    """Whether three steps on every image of a store end in a finite loss."""
    code, result = outcome(capsys, ["pretrain", str(store), str(folder), *STUDENT, "--image-size", str(2 * PATCH)])
    return code == 0 and math.isfinite(result["loss"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_whose_checksums_are_made_again_without_an_edit_is_sound(kind, stores, tmp_path, capsys):
    shutil.copytree(stores[kind], tmp_path / "s")
    EditedStore(tmp_path / "s").sign()
    assert outcome(capsys, ["verify", str(tmp_path / "s"), "--json"]) == (0, {"ok": True, "damaged": []})
    assert trains(capsys, tmp_path / "s", tmp_path / "run")


def test_a_store_with_edits_and_right_checksums_is_refused_or_can_be_trained_on(
    stores, tmp_path_factory, capsys, record_property
):
    counts = {"refused": 0, "trained": 0}

    # A smaller example says no more than its numbers, and finding one takes minutes.
    @settings(
        max_examples=ROUNDS,
        phases=[Phase.reuse, Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        st.sampled_from(sorted(KINDS)),
        st.lists(st.sampled_from(sorted(EDITS)), min_size=1, max_size=2, unique=True),
        st.integers(0, 2**32),
    )
    def check(kind, names, number):
        start = time.monotonic()
        folder = tmp_path_factory.mktemp("edited")
        shutil.copytree(stores[kind], folder / "s")
        store, random = EditedStore(folder / "s"), Random(number)
        for name in names:
            apply(name, store, random)
        store.sign()
        if outcome(capsys, ["verify", str(folder / "s"), "--json"])[0]:
            counts["refused"] += 1
            read_all(folder / "s")
        else:
            assert trains(capsys, folder / "s", folder / "run"), (kind, names, number)
            counts["trained"] += 1
        shutil.rmtree(folder)
        assert time.monotonic() - start < SECONDS

    check()
    record_property("cases", sum(counts.values()))
    print(counts)
    assert counts["refused"] > counts["trained"]


def read_all(folder):
    """Read all of a store that was refused: it ends in an error that names a file, or in numbers."""
    try:
        for store in open_scales(folder):
            for index in range(len(store)):
                store.view_pixels(index, 0, 0, store.grid)
                store.pixels(index)
                for flipped in (False, True):
                    store.view_tokens(index, 0, 0, store.grid, flipped)
    except InputError as error:
        assert "\n" not in str(error)
