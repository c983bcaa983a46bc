"""Teacher and codec beside the CPU: the same stores as on the CPU, but for how sums are rounded."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fastmae.offline import fill
from fastmae.offline.encoding import DeviceEncoder, exact_pixel_sums
from fastmae.offline.middle_images import pixel_sums
from fastmae.tokens.format import shard_path


@pytest.fixture
def device_encoder(monkeypatch):
    """Stores are built as beside an accelerator, with the CPU in its place."""
    monkeypatch.setattr(fill, "encoder_of", DeviceEncoder)


@pytest.mark.parametrize(
    "options",
    [["--codec", "fp16"], ["--codec", "pq16", "--flips", "stored"], ["--codec", "int8", "--pixels", "jpeg"]],
    ids=["fp16", "pq", "jpeg"],
)
def test_a_store_made_beside_an_accelerator_holds_what_one_made_on_the_cpu_holds(
    options, photos, tokenize, verify, tmp_path, device_encoder, monkeypatch
):
    images = tmp_path / "images"
    images.mkdir()
    for file in (photos / "train" / "china").iterdir():
        (images / file.name).symlink_to(file)
    (images / "04b.jpg").write_bytes(b"not an image")
    more = [*options, "--batch-size", "3"]
    assert tokenize(images, tmp_path / "device", *more)[0] == 0
    monkeypatch.undo()
    assert tokenize(images, tmp_path / "cpu", *more)[0] == 0
    assert verify(tmp_path / "device")[0] == 0
    for shard in range(2):
        device, cpu = (load_file(shard_path(tmp_path / name, shard)) for name in ("device", "cpu"))
        assert device.keys() == cpu.keys()
        for name, tensor in cpu.items():
            if name.endswith("_sums"):
                np.testing.assert_allclose(device[name], tensor, rtol=1e-12)
            else:
                np.testing.assert_array_equal(device[name], tensor)


def test_a_batch_is_finished_only_after_the_next_ones_were_started(photos, tokenize, tmp_path, monkeypatch):
    events = []

    class Watched(DeviceEncoder):
        def start(self, batch):
            events.append("start")
            return super().start(batch)

        def finish(self, started):
            events.append("finish")
            return super().finish(started)

    monkeypatch.setattr(fill, "encoder_of", Watched)
    assert tokenize(photos / "train", tmp_path / "s", "--batch-size", "4")[0] == 0
    started = [events[: number + 1].count("start") for number, event in enumerate(events) if event == "finish"]
    assert started == [3, 4, 5, 6, 7, 8, 8, 8]


def test_tokens_that_are_not_finite_stop_the_build_with_one_line(photos, tokenize, tmp_path, monkeypatch):
    monkeypatch.setattr(fill, "encoder_of", DeviceEncoder)
    monkeypatch.setattr(
        "fastmae.offline.encoding.run_teacher",
        lambda teacher, pixels: torch.full((len(pixels), teacher.grid, teacher.grid, teacher.token_dim), torch.nan),
    )
    code, _, err = tokenize(photos / "val", tmp_path / "s", "--codec", "fp16")
    assert code == 2
    assert "NaN or infinity" in err.splitlines()[-1]


def test_exact_sums_are_those_of_the_pixels():
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    values = pixels.numpy().astype(object)
    sums, squares = exact_pixel_sums(pixels).tolist()
    assert sums == [values[:, channel].sum() for channel in range(3)]
    assert squares == [(values[:, channel] ** 2).sum() for channel in range(3)]
    expected = torch.tensor([sums, squares]).double() / torch.tensor([[255.0], [255.0**2]]).double()
    torch.testing.assert_close(pixel_sums(pixels), expected, rtol=1e-12, atol=0)
