import pytest

from fastmae.errors import InputError
from fastmae.runtime import batch_memory
from fastmae.runtime.batch_memory import check_batch

pytestmark = pytest.mark.promise("machine")


def test_a_batch_beyond_the_machines_memory_is_refused(monkeypatch):
    monkeypatch.setattr(batch_memory, "memory_of_machine", lambda: 8 * 3 * 100**2)
    check_batch(8, 3, 100)
    with pytest.raises(InputError, match=r"^--batch-size: 9 images of 100 x 100 pixels are 0 GB, .* give a smaller"):
        check_batch(9, 3, 100)


def test_the_machine_has_some_memory():
    assert batch_memory.memory_of_machine() > 1 << 20
