import errno
import os

import pytest
import torch

from fastmae.errors import InputError
from fastmae.runs.checkpoint import is_checkpoint, load_checkpoint, write_checkpoint

CHECKPOINT = {"model": {"weight": torch.arange(6.0).view(2, 3)}, "run": {"task": "pretrain"}, "step": 7}


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_checkpoint_is_read_back_as_it_was_written(tmp_path):
    file = tmp_path / "checkpoint.pt"
    write_checkpoint(file, CHECKPOINT)
    checkpoint = load_checkpoint(file)
    assert torch.equal(checkpoint["model"]["weight"], CHECKPOINT["model"]["weight"])
    assert (checkpoint["run"], checkpoint["step"]) == ({"task": "pretrain"}, 7)
    assert is_checkpoint(file)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(InputError, match=r"checkpoint\.pt"):
        load_checkpoint(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda _: b"", lambda _: b"not a checkpoint"])
def test_a_damaged_checkpoint_is_named_in_one_line(damage, tmp_path):
    file = tmp_path / "checkpoint.pt"
    write_checkpoint(file, CHECKPOINT)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=r"checkpoint\.pt") as caught:
        load_checkpoint(file)
    assert "\n" not in str(caught.value)
    assert not is_checkpoint(file)


def test_another_projects_checkpoint_is_not_mistaken_for_one_of_a_run(tmp_path):
    file = tmp_path / "mae.pth"
    torch.save({"model": {}, "epoch": 3}, file)
    assert not is_checkpoint(file)
    with pytest.raises(InputError, match=r"mae\.pth"):
        load_checkpoint(file)


def test_no_code_is_run_from_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Malicious(), "run": {}}, "checkpoint.pt")
    with pytest.raises(InputError, match=r"checkpoint\.pt"):
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert not is_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "executed").exists()


def test_a_full_disk_is_reported_as_such_and_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    file = tmp_path / "checkpoint.pt"
    write_checkpoint(file, CHECKPOINT)
    earlier = file.read_bytes()

    def save_on_a_full_disk(checkpoint, stream):
        stream.write(b"half")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", save_on_a_full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        write_checkpoint(file, CHECKPOINT)
    assert file.read_bytes() == earlier
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
