import argparse
import errno
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from fastmae.errors import InputError
from fastmae.outside import tensors
from fastmae.outside.tensors import check_finite, load_into, opened, read_tensors

pytestmark = pytest.mark.promise("networks")

WEIGHTS = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(2)}


def saved(content, file):
    torch.save(content, file)
    return file


def repacked(file, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    """Write the archive of `torch.save` anew."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, change(name, data))
    return file


def refusal(file):
    with pytest.raises(InputError) as caught:
        read_tensors(file)
    message = str(caught.value)
    assert str(file) in message
    assert "\n" not in message
    return message


def test_both_kinds_of_file_give_the_tensors_that_were_saved(tmp_path):
    safetensors.torch.save_file(WEIGHTS, tmp_path / "a.safetensors")
    torch.save(WEIGHTS, tmp_path / "a.pth")
    torch.save(WEIGHTS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("a.safetensors", "a.pth", "old.pth"):
        read = read_tensors(tmp_path / name)
        assert read.keys() == WEIGHTS.keys()
        assert all(torch.equal(read[key], tensor) for key, tensor in WEIGHTS.items())


def test_a_wrong_suffix_is_no_damage(tmp_path):
    safetensors.torch.save_file(WEIGHTS, tmp_path / "a.pth")
    assert read_tensors(tmp_path / "a.pth").keys() == WEIGHTS.keys()
    assert "rename it to .pth" in refusal(saved(WEIGHTS, tmp_path / "a.safetensors"))


def test_what_lies_around_the_tensors_stays_and_shared_ones_stay_shared(tmp_path):
    shared = torch.arange(10.0)
    content = {"args": argparse.Namespace(lr=0.1), "parts": [shared, (shared[2:5], 7)], "note": "x"}
    read = read_tensors(saved(content, tmp_path / "a.pth"))
    assert (read["args"].lr, read["note"], read["parts"][1][1]) == (0.1, "x", 7)
    read["parts"][0][2] = 100
    assert read["parts"][1][0].tolist() == [100, 3, 4]


def test_tensors_in_memory_outlive_their_file(tmp_path):
    file = saved(WEIGHTS, tmp_path / "a.pth")
    read = read_tensors(file)
    file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(read["weight"], WEIGHTS["weight"])


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"<!DOCTYPE html><html><body>not found", "is a web page, not weights; download it again"),
        (b"\xef\xbb\xbf\n <html>", "is a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied", "is a web page"),
        (b'{"error": "Repository not found"}', "is text .*Repository not found.*, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
        (b"", "is empty"),
        (b"\x1f\x8b\x08\x00" + b"\0" * 50, "damaged, or not a weights file"),
        (b"PK\x03\x04" + b"\0" * 50, "damaged"),
        (b"\x80\x02}q\x00.", "damaged, or not a weights file"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "damaged, or not a weights file"),
        ((500).to_bytes(8, "little") + b'{"weight"', "cut off"),
    ],
)
def test_what_is_no_weights_file_is_said_as_what_it_is(content, cause, tmp_path):
    file = tmp_path / "a.pth"
    file.write_bytes(content)
    with pytest.raises(InputError, match=rf"^{file}: .*{cause}"):
        read_tensors(file)


@pytest.mark.timeout(10)
def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    assert "is a named pipe" in refusal(tmp_path / "pipe.pth")
    assert "can't be read" in refusal(tmp_path)
    assert "no such weights file" in refusal(tmp_path / "none.pth")


def test_a_compressed_archive_is_refused_before_it_is_unfolded(tmp_path):
    file = saved({"model": torch.zeros(1_000_000)}, tmp_path / "a.pt")
    repacked(file, compression=zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 10_000
    assert "would unfold to 4 MB" in refusal(file)


def test_tensors_larger_than_their_bytes_are_refused(tmp_path):
    assert "shape [1000, 2]" in refusal(saved({"wide": torch.ones(2).expand(1000, 2)}, tmp_path / "a.pth"))

    def ask_for_more(name, data):  # 6 numbers become 268 million
        return data.replace(b"K\x06", b"J\x00\x00\x00\x10") if name.endswith("data.pkl") else data

    longer = repacked(saved({"w": torch.arange(6.0)}, tmp_path / "b.pth"), ask_for_more)
    assert "damaged" in refusal(longer)


def test_a_small_pickle_cannot_ask_for_memory(tmp_path):
    class Large:
        def __reduce__(self):
            return bytearray, (1 << 40,)

    assert "more than tensors" in refusal(saved({"w": Large()}, tmp_path / "a.pth"))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("levels", [50, 100])
def test_lists_that_hold_each_other_twice_are_not_walked_for_ever(levels, tmp_path):
    lists: list = []
    for _ in range(levels):
        lists = [lists, lists]
    assert "nested too deeply" in refusal(saved({"w": lists}, tmp_path / "a.pth"))


def test_no_code_is_run(tmp_path, monkeypatch):
    class Malicious:
        def __reduce__(self):
            return os.mkdir, ("executed",)

    monkeypatch.chdir(tmp_path)
    assert "would run its code" in refusal(saved({"w": Malicious()}, tmp_path / "a.pth"))
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Malicious(), protocol=2))
    refusal(tmp_path / "old.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_number_is_named(kind, value, tmp_path):
    weights = {"a": torch.ones(3, dtype=kind), "empty": torch.ones(0), "count": torch.tensor(3), "b": torch.ones(3)}
    check_finite(weights, "x.pth")
    weights["b"] = torch.tensor([0.0, value]).to(kind)
    with pytest.raises(InputError, match=r"^x\.pth: b holds NaN or infinite numbers"):
        check_finite(weights, "x.pth")


@pytest.mark.parametrize(
    ("weights", "cause"),
    [
        ({"weight": torch.ones(2, 3)}, "lacks bias; 1 missing, 0 unexpected"),
        ({**WEIGHTS, "scale": torch.ones(1)}, "has scale besides; 0 missing, 1 unexpected"),
        ({**WEIGHTS, "bias": torch.ones(3)}, r"bias has shape \[3\], the model's has \[2\]"),
        ({**WEIGHTS, "bias": torch.full((2,), torch.nan)}, "bias holds NaN"),
    ],
)
def test_weights_of_another_network_are_refused_by_the_name_of_a_tensor(weights, cause):
    network = nn.Linear(3, 2)
    before = network.weight.detach().clone()
    with pytest.raises(InputError, match=rf"x\.pth: .*{cause}"):
        load_into(network, weights, "x.pth")
    assert torch.equal(network.weight, before)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
    ],
)
def test_memory_that_does_not_suffice_is_not_called_a_damaged_file(error, tmp_path, monkeypatch):
    file = saved(WEIGHTS, tmp_path / "a.pth")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(tensors.torch, "load", fail)
    message = refusal(file)
    assert "not enough memory" in message
    assert "the file is fine" in message


def test_an_opened_file_is_not_read_whole(tmp_path):
    file = saved({"w": torch.zeros(10_000_000)}, tmp_path / "a.pth")

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    with opened(file) as (value, is_safetensors):
        assert value["w"].shape == (10_000_000,)
        assert not is_safetensors
        assert resident() - before < 20e6
