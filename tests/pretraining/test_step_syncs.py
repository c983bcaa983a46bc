"""Host syncs of a pre-training step, counted on the simulated accelerator: none between two log entries."""

import pytest

from fastmae.cli import run
from fastmae.runtime import ring
from fastmae.training import loop
from simulated.device import pinned_in_place
from simulated.syncs import SYNCS

pytestmark = pytest.mark.accelerator

SHORT = "--image-size 64 --batch-size 8 --epochs 1.06 --log-every 2 --device sim --workers 0"
VIT = (
    "--encoder vit_tiny_patch16_224 --encoder-depth 2 --encoder-width 64 --encoder-heads 2 "
    "--decoder-width 32 --decoder-heads 2"
)
STEPS = {
    "fp16 tokens": (["cnn_store"], VIT),
    "pq tokens": (["small_store"], VIT),
    "tokens normalised over the store": (["small_store"], f"{VIT} --norm store"),
    "two teachers": (["vit_store", "small_store"], f"{VIT} --store-weights 1,0.5"),
    "an online teacher": (["vit_store"], f"{VIT} --target teacher"),
    "pixels": (["vit_store"], f"{VIT} --target pixels"),
    "HOG": (["vit_store"], f"{VIT} --target hog"),
    "no decoder, and relations": (["vit_store"], f"{VIT} --decoder-depth 0 --relation-weight 1"),
    "rotary positions": (["vit_store"], f"{VIT} --encoder vit_small_patch16_dinov3"),
    "a CNN": (["cnn_store"], "--encoder resnet10t --mask-ratio 0 --decoder-depth 0"),
    "accumulated gradients": (["vit_store"], f"{VIT} --micro-batch 4"),
    "a moving average": (["vit_store"], f"{VIT} --ema 0.99"),
    "clipped gradients": (["vit_store"], f"{VIT} --clip-grad 1"),
    "Muon": (["vit_store"], f"{VIT} --optimizer muon"),
    "recomputed activations": (["vit_store"], f"{VIT} --checkpoint-activations"),
    "a loading process": (["vit_store"], f"{VIT} --workers 1"),
}
"""Kind of step -> stores and options."""


@pytest.fixture
def syncs_between_log_entries(monkeypatch, tmp_path):
    """(stores, options) -> syncs of two steps, from one log entry to the next; what comes before is set-up."""
    counted = []
    make_entry = loop._log_entry

    def log_entry(*args):
        counted.append(dict(SYNCS.counts))
        entry = make_entry(*args)
        SYNCS.counts.clear()
        return entry

    def count(stores, options):
        monkeypatch.setattr(loop, "_log_entry", log_entry)
        monkeypatch.setattr(ring, "pinned_in_place", pinned_in_place)
        assert run(["pretrain", *map(str, stores), str(tmp_path / "run"), *SHORT.split(), *options]) == 0
        _, between_entries = counted
        return between_entries

    return count


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_waits_for_nothing_until_its_figures_are_logged(kind, syncs_between_log_entries, request):
    stores, options = STEPS[kind]
    assert syncs_between_log_entries([request.getfixturevalue(store) for store in stores], options.split()) == {}
