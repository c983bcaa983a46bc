"""What the tests of loggers share."""

import io

import pytest
from PIL import Image


@pytest.fixture
def png() -> bytes:
    """The file of a red picture."""
    file = io.BytesIO()
    Image.new("RGB", (8, 4), (255, 0, 0)).save(file, "png")
    return file.getvalue()
