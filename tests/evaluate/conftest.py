"""Feature files read back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy


@pytest.fixture(scope="session")
def read_features() -> Callable[[Path], dict[str, Any]]:
    """A .safetensors file of `fastmae features` -> its arrays, and its paths as a list."""

    def read(file: Path) -> dict[str, Any]:
        tensors = safetensors.numpy.load_file(file)
        return {**tensors, "paths": tensors["paths"].tobytes().decode("utf-8", "surrogateescape").split("\0")}

    return read
