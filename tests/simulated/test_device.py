"""The simulated accelerator behaves as a GPU does: what it refuses, what it counts as a sync, and its autocast."""

import copy
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from simulated.device import MixedDevicesError, SimTensor, pinned_in_place
from simulated.syncs import SYNCS

pytestmark = pytest.mark.accelerator

DEVICE = "sim:0"
UNPINNED = ", by memory that is not pinned"


@pytest.fixture
def on_device():
    """Two by three numbers, 0 to 5."""
    return torch.arange(6.0).view(2, 3).to(DEVICE)


@pytest.fixture
def on_cpu():
    return torch.ones(2, 3)


@pytest.fixture
def reasons():
    """(action) -> why it made the program wait for the device."""

    def run(action):
        SYNCS.counts.clear()
        action()
        return [place.split(": ", 1)[1] for place in SYNCS.counts.elements()]

    return run


def test_results_stay_on_the_device_and_are_those_of_the_cpu(on_device):
    result = (on_device @ on_device.T).softmax(1)[:, 1:]
    assert (type(result), str(result.device), result.shape) == (SimTensor, DEVICE, (2, 1))
    numbers = torch.arange(6.0).view(2, 3)
    assert torch.equal(result.cpu(), (numbers @ numbers.T).softmax(1)[:, 1:])


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.tensor([1.0, 2], device="sim"),
        lambda: torch.arange(3, device="sim"),
        lambda: torch.eye(3, device="sim"),
        lambda: torch.linspace(0, 1, 3, device="sim"),
        lambda: torch.randperm(3, device="sim"),
        lambda: torch.rand(3, device="sim"),
        lambda: torch.full((3,), 2.0, device="sim"),
        lambda: torch.ones(3).new_zeros(2, device="sim"),
        lambda: torch.zeros(1, device="sim").new_tensor([1, 2]),
        lambda: torch.empty_like(torch.ones(3), device="sim"),
        lambda: nn.Linear(2, 3, device="sim").weight,
        lambda: torch.rand(3, generator=torch.Generator("sim"), device="sim"),
    ],
)
def test_tensors_are_made_on_the_device(make):
    made = make()
    assert str(made.device) == DEVICE
    assert made.shape == made.host.shape


def test_tensors_are_made_there_in_other_threads_and_in_inference_mode_too(on_device):
    made = []
    thread = threading.Thread(target=lambda: made.append(torch.tensor([1, 2], device="sim")))
    thread.start()
    thread.join()
    with torch.inference_mode():
        made.append(on_device.expand(4, 2, 3) + 1)
    assert [str(tensor.device) for tensor in made] == [DEVICE, DEVICE]


@pytest.mark.parametrize(
    "mix",
    [
        lambda on_device, on_cpu: on_device + on_cpu,
        lambda on_device, on_cpu: on_cpu * on_device[0, 0],  # CUDA takes scalars of the CPU, not the other way round
        lambda on_device, on_cpu: on_cpu[0, 0].add_(on_device[0, 0]),
        lambda on_device, on_cpu: torch.cat([on_device, on_cpu]),
        lambda on_device, on_cpu: torch.stack([on_device[0, 0], on_cpu[0, 0]]),
        lambda on_device, on_cpu: on_cpu[torch.zeros(1, dtype=torch.long, device="sim")],
        lambda on_device, on_cpu: on_device.index_put_([torch.tensor([0], device="sim")], on_cpu[0]),
        F.linear,
        lambda on_device, on_cpu: nn.LayerNorm(3)(on_device),
        lambda on_device, on_cpu: torch._foreach_add_([on_device], [on_cpu]),
    ],
)
def test_tensors_on_different_devices_are_refused(mix, on_device, on_cpu):
    with pytest.raises(MixedDevicesError, match=r"are on sim:0, but .* on the CPU"):
        mix(on_device, on_cpu)


def test_scalars_on_the_cpu_may_be_mixed_in(on_device):
    scalar = torch.tensor(2.0)
    assert torch.equal((on_device * scalar).cpu(), on_device.cpu() * 2)
    assert torch.equal(torch.where(on_device > 2, scalar, on_device).cpu().flatten()[3:], torch.full((3,), 2.0))


def test_numpy_cannot_read_it(on_device):
    for read in (on_device.numpy, lambda: np.asarray(on_device), lambda: np.array([on_device[0, 0]])):
        with pytest.raises(TypeError, match=r"use Tensor.cpu\(\) first"):
            read()


@pytest.mark.parametrize(
    ("wait", "reason"),
    [
        (lambda x: x[0, 0].item(), "item()"),
        (lambda x: float(x.sum()), "item()"),
        (lambda x: bool((x > 1).any()), "item()"),
        (lambda x: torch.equal(x, x), "item()"),
        (lambda x: x.tolist(), "tolist()"),
        (lambda x: x.nonzero(), "nonzero, whose result has a size that only the device knows"),
        (lambda x: x.unique(), "_unique2, whose result has a size that only the device knows"),
        (lambda x: x[x > 1], "indexing with a mask"),
        (lambda x: x[torch.tensor([0])], "indexing with a tensor on the CPU"),
        (lambda x: x.cpu(), "copy of [2, 3] to the CPU"),
        (lambda x: torch.ones(2, 3).copy_(x), "copy of [2, 3] to the CPU"),
        (
            lambda x: torch.ones(2, 3).copy_(x, non_blocking=True),
            f"copy of [2, 3] to the CPU{UNPINNED}",
        ),
        (lambda x: torch.ones(4).to("sim"), "copy of [4] to the device"),
        (lambda x: torch.tensor([1, 2], device="sim"), "copy of [2] to the device"),
        (
            lambda x: torch.ones(4).to("sim", non_blocking=True),
            f"copy of [4] to the device{UNPINNED}",
        ),
        (lambda x: torch.accelerator.synchronize(x.device), "synchronize()"),
    ],
)
def test_what_waits_for_the_device_is_counted_once(wait, reason, on_device, reasons):
    assert reasons(lambda: wait(on_device)) == [reason]


@pytest.mark.parametrize(
    "go_on",
    [
        lambda x: x.softmax(1) @ x.T,
        lambda x: torch.ones(4).pin_memory().to("sim", non_blocking=True),
        lambda x: torch.ones(4).pin_memory().view(2, 2)[1].to("sim", non_blocking=True),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: torch.empty(2, 3).pin_memory().copy_(x, non_blocking=True),
        lambda x: torch.empty(0).to("sim"),
        lambda x: x.masked_fill_(x > 1, 0.0),
        lambda x: x.__setitem__(x > 1, 0.0),  # computed as masked_fill_
        lambda x: x[torch.tensor([0], device="cpu").pin_memory().to("sim", non_blocking=True)],
        lambda x: torch.full_like(x, 2.0),
        lambda x: nn.utils.clip_grad_norm_([nn.Parameter(x.clone())], 1.0),
    ],
)
def test_what_the_device_does_by_itself_is_not(go_on, on_device, reasons):
    assert reasons(lambda: go_on(on_device)) == []


def test_memory_is_pinned_as_a_copy_or_for_a_while_in_place():
    pinned, ordinary = torch.ones(4).pin_memory(), torch.ones(4)
    assert pinned.is_pinned()
    assert pinned[1:].is_pinned()
    with pinned_in_place(ordinary, torch.device("sim")):
        assert ordinary[1:].is_pinned()
    assert not ordinary.is_pinned()


def test_a_stream_has_done_its_work_when_it_was_given_it(on_device, reasons):
    def copy_on_own_stream():
        stream, end = torch.sim.Stream(device=on_device.device), torch.sim.Event()
        assert not end.query()
        with torch.sim.stream(stream):
            on_device.to("cpu", non_blocking=True)
            end.record(stream)
        torch.sim.current_stream(on_device.device).wait_event(end)
        on_device.record_stream(stream)
        assert end.query()

    assert reasons(copy_on_own_stream) == []
    assert reasons(torch.sim.Event().synchronize) == ["synchronize() of an event"]


def test_autocast_lowers_products_and_keeps_sums_and_norms_in_fp32(on_device):
    linear, norm = nn.Linear(3, 4, device="sim"), nn.LayerNorm(4, device="sim")
    with torch.autocast("sim", dtype=torch.bfloat16):
        product = linear(on_device)
        assert (product.dtype, norm(product).dtype) == (torch.bfloat16, torch.float32)
        assert product.softmax(1).dtype == product.sum().dtype == torch.float32
        loss = product.float().square().sum()
    loss.backward()
    assert (linear.weight.grad.dtype, str(linear.weight.grad.device)) == (torch.float32, DEVICE)
    assert on_device.to(torch.bfloat16).dtype == torch.bfloat16
    assert linear(on_device).dtype == torch.float32  # not outside


def test_a_network_trains_there_as_on_the_cpu_and_its_copy_is_independent():
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 1))]
    networks.append(copy.deepcopy(networks[0]).to("sim"))
    before = copy.deepcopy(networks[1])
    numbers = torch.randn(16, 3)
    for network in networks:
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
        inputs = numbers.to(next(network.parameters()).device)
        for _ in range(3):
            F.mse_loss(network(inputs), inputs.sum(1, keepdim=True)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for expected, weight, first in zip(*(network.parameters() for network in (*networks, before)), strict=True):
        assert torch.allclose(weight.cpu(), expected, atol=1e-5)
        assert not torch.equal(weight.cpu(), first.cpu())


def test_tensors_come_back_from_a_file_on_the_cpu(on_device, tmp_path):
    torch.save({"numbers": on_device}, tmp_path / "saved.pt")
    numbers = torch.load(tmp_path / "saved.pt", map_location="cpu", weights_only=True)["numbers"]
    assert torch.equal(numbers, torch.arange(6.0).view(2, 3))
