"""A simulated accelerator: torch's device `sim:0`. It computes on the CPU, but looks like a GPU to the code under test.

Its tensors don't mix with CPU tensors, and NumPy can't read them. What would make a CUDA program wait for the device, a
host sync, is written down in `SYNCS`. So code for GPUs can be tested without one.

It is registered as torch's PrivateUse1 backend, which can't be undone: use it in a process of its own (`own_process`).
"""

import collections
import contextlib
import functools
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from simulated import autocast
from simulated.syncs import SYNCS

aten = torch.ops.aten

NAME = "sim"

DATA_DEPENDENT = {
    op: f"{op._schema.name.removeprefix('aten::')}, whose result has a size that only the device knows"
    for op in (
        aten.nonzero.default,
        aten.masked_select.default,
        aten._unique2.default,
        aten.unique_dim.default,
        aten.unique_consecutive.default,
        aten.bincount.default,
        aten.repeat_interleave.Tensor,
    )
}
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
FACTORIES = """empty.memory_format empty_strided arange arange.start arange.start_step eye eye.m tril_indices
    triu_indices""".split()
"""What makes tensors without being given any; torch builds its other such functions from these."""
COPYING = (aten._to_copy.default, aten.copy_.default)

_pinned: collections.Counter[tuple[int, int]] = collections.Counter()
"""Addresses, first and behind the last, of memory that is pinned."""
_libraries: list[torch.library.Library] = []


class MixedDevicesError(RuntimeError):
    """An operation got tensors of the CPU and of the simulated accelerator."""


class SimTensor(torch.Tensor):
    """A tensor on `sim:0`.

    Attributes:
        host: the same tensor on the CPU, which holds the values.
    """

    host: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> "SimTensor":
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(NAME, 0),
        )
        wrapper.host = host
        return wrapper

    def __repr__(self, **_: Any) -> str:
        return f"SimTensor({self.host})"

    def tolist(self) -> Any:
        SYNCS.note("tolist()")
        return self.host.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy; use Tensor.cpu() first")

    def record_stream(self, _: Any) -> None:
        """Nothing: memory is not reused before Python frees it."""

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.host.detach().__reduce_ex__(protocol)  # into a file, from which it comes back on the CPU

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        if id(self) not in memo:
            copied: torch.Tensor = SimTensor(self.host.detach().clone())
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
        return memo[id(self)]

    # With these two, Module.to swaps whole tensors. Their data alone would leave `host` behind.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["host"], None

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, torch.Tensor], *_: Any) -> "SimTensor":
        return SimTensor(inner["host"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, *args, **(kwargs or {}))


def compute(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation with tensors of the simulated accelerator, or one that makes such a tensor.

    Raises:
        MixedDevicesError: CUDA would refuse it for tensors on different devices.
    """
    refuse_mixed_devices(func, args, kwargs)
    note_sync(func, args, kwargs)
    host_kwargs = {name: _host_argument(name, value) for name, value in kwargs.items()}
    host_args, host_kwargs = tree_map(host_of, (args, host_kwargs))
    result = func(*host_args, **host_kwargs)
    device, tensors = kwargs.get("device"), _tensors(args, kwargs)
    if any(isinstance(tensor, SimTensor) and tensor.shape != tensor.host.shape for tensor in tensors):
        raise NotImplementedError(f"{func}: the simulated accelerator can't change a tensor's shape in place")
    if not (on_sim(device) if device is not None else any(isinstance(tensor, SimTensor) for tensor in tensors)):
        return result
    # In inference mode, a view of a normal tensor is a normal tensor, too.
    aliases = [returned.alias_info for returned in func._schema.returns if returned.alias_info is not None]
    is_normal = any(not alias.is_write for alias in aliases) and not args[0].is_inference()
    with torch.inference_mode(torch.is_inference_mode_enabled() and not is_normal):
        wrapped = tree_map(lambda value: SimTensor(value) if _is_host_tensor(value) else value, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if tensors else wrapped


def refuse_mixed_devices(func: Any, args: Any, kwargs: Any) -> None:
    """As CUDA's operations do: scalars on the CPU go with tensors on the device, everything else doesn't.

    Raises:
        MixedDevicesError: it is refused.
    """
    tensors = _tensors(args, kwargs)
    on_device = [tensor for tensor in tensors if isinstance(tensor, SimTensor)]
    on_host = [tensor for tensor in tensors if not isinstance(tensor, SimTensor)]
    if not on_device or not on_host or func in COPYING:
        return
    if func in INDEXING:  # a CPU tensor may be an index, but CPU tensors can't be indexed from the device
        values = [value for value in (args[0], *args[2:3]) if isinstance(value, torch.Tensor)]
        refused = not isinstance(args[0], SimTensor) or any(_is_host_tensor(v) and v.dim() for v in values)
    else:
        in_lists = _tensors([argument for argument in args if isinstance(argument, list | tuple)], {})
        changes_host = func._schema.is_mutable and _is_host_tensor(args[0])
        refused = changes_host or any(_is_host_tensor(t) for t in in_lists) or any(t.dim() for t in on_host)
    if refused:
        shapes = [[tuple(tensor.shape) for tensor in part] for part in (on_device, on_host)]
        raise MixedDevicesError(f"{func}: tensors {shapes[0]} are on {NAME}:0, but {shapes[1]} on the CPU")


def note_sync(func: Any, args: Any, kwargs: Any) -> None:
    """Write down an operation for which a CUDA program would wait until the device has done all its work."""
    if func in COPYING:
        if func is aten.copy_.default:
            target, source = args[:2]
            to_device, asynchronous = isinstance(target, SimTensor), bool(args[2:] and args[2])
            host = source if to_device else target
        else:
            source, asynchronous = args[0], kwargs.get("non_blocking", False)
            device = kwargs.get("device")
            to_device = isinstance(source, SimTensor) if device is None else on_sim(device)
            host = source if to_device else None  # a copy to the CPU gets pinned memory if it is asynchronous
        if to_device == isinstance(source, SimTensor) or source.numel() == 0:
            return
        if not asynchronous or (host is not None and not is_pinned(host)):
            way = "to the device" if to_device else "to the CPU"
            kind = ", by memory that is not pinned" if asynchronous else ""
            SYNCS.note(f"copy of {list(source.shape)} {way}{kind}")
    elif not any(isinstance(tensor, SimTensor) for tensor in _tensors(args, kwargs)):
        return
    elif func in (aten._local_scalar_dense.default, aten.equal.default):
        SYNCS.note("item()")
    elif func in DATA_DEPENDENT:
        SYNCS.note(DATA_DEPENDENT[func])
    elif func in INDEXING:
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices) and not _fills(func, args, indices):
            SYNCS.note("indexing with a mask")
        if not all(isinstance(index, SimTensor) for index in indices):
            SYNCS.note("indexing with a tensor on the CPU")


def is_pinned(tensor: torch.Tensor) -> bool:
    """Whether a CPU tensor is in pinned memory."""
    pinned = [addresses for addresses, count in list(_pinned.items()) if count]  # other threads pin, too
    return any(start <= tensor.data_ptr() < end for start, end in pinned)


@contextlib.contextmanager
def pinned_in_place(memory: torch.Tensor, _device: torch.device) -> Iterator[None]:
    """Pins memory where it is, as `fastmae.runtime.device.pinned_in_place` does for NVIDIA's GPUs."""
    addresses = _addresses(memory)
    _pinned[addresses] += 1
    yield
    _pinned[addresses] -= 1


def on_sim(device: Any) -> bool:
    """Whether a device is the simulated accelerator."""
    return device is not None and torch.device(device).type == NAME


def host_of(value: Any) -> Any:
    """The CPU tensor that holds the values of a `SimTensor`; anything else as it is."""
    return value.host if isinstance(value, SimTensor) else value


def _is_host_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, SimTensor)


def _tensors(args: Any, kwargs: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]


def _host_argument(name: str, value: Any) -> Any:
    if name == "device" and value is not None:
        return torch.device("cpu")
    return False if name == "pin_memory" else value


def _fills(func: Any, args: Any, indices: list[torch.Tensor]) -> bool:
    """Whether an index_put_ is computed as masked_fill, without a sync: one mask, and one value for all its places."""
    is_one_value = func is not aten.index.Tensor and args[2].numel() == 1 and not any(args[3:4])
    return is_one_value and len(indices) == 1


class SimStream:
    """A stream, on which everything is done at once."""

    def __init__(self, device: Any = None):
        self.device = device

    def wait_event(self, _: Any) -> None:
        """It has happened already."""

    def wait_stream(self, _: Any) -> None:
        """It is done already."""

    def synchronize(self) -> None:
        SYNCS.note("synchronize() of a stream")


class SimEvent:
    """A point of a stream. When it is recorded, everything before it is done."""

    def __init__(self, **_: Any):
        self.recorded = False

    def record(self, _: Any = None) -> None:
        self.recorded = True

    def query(self) -> bool:
        return self.recorded

    def synchronize(self) -> None:
        SYNCS.note("synchronize() of an event")


class SimModule(backend_registration._DummyBackendModule):
    """`torch.sim`, as `torch.cuda` is for CUDA."""

    class device:  # noqa: N801  # torch's name
        """Context in which a device is the current one: there is only one."""

        def __init__(self, _: Any):
            self.idx = 0

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    Stream, Event = SimStream, SimEvent

    def stream(self, _: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def current_stream(self, device: Any = None) -> SimStream:
        return SimStream(device)

    def synchronize(self, _: Any = None) -> None:
        SYNCS.note("synchronize()")

    def set_device(self, _: Any) -> None:
        """There is only one."""

    def empty_cache(self) -> None:
        """Nothing is cached."""

    def get_rng_state(self, _: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, _: Any = None) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return True

    def get_device_name(self, _: Any = None) -> str:
        return "simulated accelerator"

    def max_memory_allocated(self, _: Any = None) -> int:
        return 1 << 20


class SimGenerator(torch.Generator):
    """`torch.Generator`, which for the device is one on the CPU: it computes there."""

    def __new__(cls, device: Any = None) -> "SimGenerator":
        return super().__new__(cls, "cpu" if device is None or on_sim(device) else device)


def register() -> None:
    """Add the device to torch, for the rest of the process. It must be done before the first backward pass."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=SimModule())
    library = torch.library.Library("aten", "IMPL")
    # What has a SimTensor among its arguments comes to __torch_dispatch__. The rest makes new tensors,
    for name in FACTORIES:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(aten, packet), overload or "default")
        library.impl(name, functools.partial(compute, operation), "PrivateUse1")
    # or copies to them out of the sight of __torch_dispatch__, as torch.tensor(..., device=) does.
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    library.impl("_pin_memory", _pin_memory, "CPU")
    library.impl("is_pinned", lambda tensor, _device=None: is_pinned(tensor), "CPU")
    # torch's own need what a backend in Python can't give.
    torch.accelerator.synchronize, torch.Generator = torch.sim.synchronize, SimGenerator
    _libraries.extend([library, *autocast.register(NAME)])


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    return compute(aten.copy_.default, target, source, non_blocking)


def _pin_memory(tensor: torch.Tensor, _device: Any = None) -> torch.Tensor:
    copied = tensor.clone()
    addresses = _addresses(copied)
    _pinned[addresses] += 1
    # Counted, since another thread may have got the memory before this hears of its end.
    weakref.finalize(copied.untyped_storage(), _pinned.subtract, [addresses])
    return copied


def _addresses(memory: torch.Tensor) -> tuple[int, int]:
    start = memory.untyped_storage().data_ptr()
    return start, start + memory.untyped_storage().nbytes()
