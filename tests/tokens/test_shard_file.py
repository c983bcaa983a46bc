"""A safetensors file from parts has the bytes that safetensors itself writes."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from fastmae.tokens.format import checksum
from fastmae.tokens.shard_file import DTYPE_NAMES, SplitTensor, write_tensors

METADATA = {"fastmae": '{"images": [["a \\"b\\" \\u00e9\\n.jpg", 0]], "tab": "\\t"}'}


def tensors_of(rows):
    """A tensor of each dtype, under names that are in no order."""
    generator = np.random.default_rng(rows)
    return {
        f"{name}_{dtype}": generator.integers(0, 200, (rows, width)).astype(dtype)
        for name, width in (("z", 3), ("a", 1))
        for dtype in DTYPE_NAMES
    }


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_the_bytes_are_those_of_safetensors(rows, tmp_path):
    tensors = tensors_of(rows)
    middle = rows // 2
    parts = {name: SplitTensor([tensor[:middle], tensor[middle:]]) for name, tensor in tensors.items()}
    write_tensors(tmp_path / "file", parts, METADATA)
    assert (tmp_path / "file").read_bytes() == save(tensors, metadata=METADATA)


def test_a_split_tensor_describes_the_whole():
    whole = torch.arange(30, dtype=torch.float16).reshape(5, 2, 3)
    split = SplitTensor.of(whole.split([1, 0, 4]))
    assert (split.shape, split.dtype, split.size) == ([5, 2, 3], np.float16, 60)
    assert split.checksum == checksum(whole.numpy().tobytes())
    for rows in (split.rows(), split.digested_rows()):
        assert all((row == expected).all() for row, expected in zip(rows, whole.numpy(), strict=True))
    again = SplitTensor.of(whole.split([2, 3]))
    assert len(list(again.digested_rows())) == 5
    assert again.checksum == split.checksum
