import pytest
import torch

from fastmae.errors import InputError
from fastmae.teachers.weights import prefix_of, read_weights, weights_of

pytestmark = pytest.mark.promise("networks")

WEIGHTS = {"stem.weight": torch.ones(2, 2), "norm.bias": torch.ones(2), "norm.count": torch.tensor(3)}
BOOKKEEPING = {"best_acc1": torch.tensor(71.5), "rng": torch.zeros(9, dtype=torch.uint8), "epoch": torch.tensor(3)}


@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        {"state_dict": WEIGHTS, **BOOKKEEPING},
        {"model": {"state_dict": WEIGHTS}, "optimizer": {"state": {0: torch.ones(3)}}},
        {"model_state_dict": WEIGHTS, "best_loss": torch.tensor(torch.inf)},
    ],
)
def test_the_weights_are_found_beside_the_bookkeeping_of_their_training(content, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    assert read_weights(tmp_path / "a.pth").keys() == WEIGHTS.keys()


@pytest.mark.parametrize("content", [BOOKKEEPING, {"model": {}}, [torch.ones(3)], {}])
def test_a_file_without_weights_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"a\.pth: (no weights in it|holds a list)"):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "model.encoder."])
def test_a_networks_weights_lose_the_prefix_of_its_wrapper(prefix, tmp_path):
    state = {f"{prefix}{name}": tensor for name, tensor in WEIGHTS.items()} | BOOKKEEPING
    assert weights_of(WEIGHTS, state, tmp_path) == WEIGHTS


def test_what_the_network_does_not_have_stays_to_be_named(tmp_path):
    scale = torch.ones(2)
    assert weights_of(WEIGHTS, {**WEIGHTS, "scale": scale}, tmp_path)["scale"] is scale


def test_a_network_that_is_there_twice_is_refused(tmp_path):
    state = {f"{part}.{name}": tensor for part in ("student", "ema") for name, tensor in WEIGHTS.items()}
    with pytest.raises(InputError, match=r"holds this network 2 times, under 'ema\.' and 'student\.'"):
        weights_of(WEIGHTS, state, tmp_path)
    assert prefix_of(WEIGHTS, {**state, **WEIGHTS}, tmp_path) == ""
