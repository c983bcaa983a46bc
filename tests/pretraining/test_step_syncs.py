"""Host syncs of a pre-training step, counted on the simulated accelerator: none between two log entries."""

import pytest

from fastmae.cli import run
from fastmae.training import loop
from simulated.syncs import SYNCS

pytestmark = pytest.mark.accelerator

STEPS = {
    "fp16 tokens": (["cnn_store"], ""),
    "pq tokens": (["small_store"], ""),
    "tokens normalised over the store": (["small_store"], "--norm store"),
    "two teachers": (["vit_store", "cnn_store"], "--store-weights 1,0.5"),
    "an online teacher": (["vit_store"], "--target teacher"),
    "two online teachers": (["vit_store", "cnn_store"], "--target teacher"),
    "pixels": (["vit_store"], "--target pixels"),
    "HOG": (["vit_store"], "--target hog"),
    "no decoder, and relations": (["vit_store"], "--decoder-depth 0 --relation-weight 1"),
    "no mask": (["vit_store"], "--decoder-depth 0 --mask-ratio 0"),
    "the loss on all patches": (["vit_store"], "--loss-on all"),
    "accumulated gradients": (["vit_store"], "--micro-batch 4"),
    "a moving average": (["vit_store"], "--ema 0.99"),
    "clipped gradients": (["vit_store"], "--clip-grad 1"),
    "Muon": (["vit_store"], "--optimizer muon"),
    "recomputed activations": (["vit_store"], "--checkpoint-activations"),
    "fp32": (["vit_store"], "--precision 32-true"),
    "a loading process": (["vit_store"], "--workers 1"),
}
"""Kind of step -> stores and options."""


@pytest.fixture
def syncs_between_log_entries(monkeypatch, tmp_path, tiny_student):
    """(stores, options) -> syncs of six steps in pairs, without those until the first log entry and in log entries."""
    counted = []
    make_entry = loop._log_entry

    def log_entry(*args):
        counted.append(dict(SYNCS.counts))
        entry = make_entry(*args)
        SYNCS.counts.clear()
        return entry

    def count(stores, options):
        monkeypatch.setattr(loop, "_log_entry", log_entry)
        size = "--epochs 1.6 --log-every 2 --device sim --workers 0".split()
        assert run(["pretrain", *map(str, stores), str(tmp_path / "run"), *tiny_student, *size, *options]) == 0
        first, *others = counted
        assert len(others) == 2
        return [syncs for syncs in others if syncs]

    return count


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_waits_for_nothing_until_its_figures_are_logged(kind, syncs_between_log_entries, request):
    stores, options = STEPS[kind]
    assert syncs_between_log_entries([request.getfixturevalue(store) for store in stores], options.split()) == []
