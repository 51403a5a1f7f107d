"""An accelerator that is played on the host's memory, for tests of what the monitor does on a real one.

``register()`` adds a device "played" to torch.  Its tensors have memory of the host, and their operations are
those of the CPU; so results have the same bits.  It plays what tells an accelerator from a CPU:

- kernels are launched, and counted (:attr:`Accelerator.kernels`);
- the host may ask for a number only by waiting, and each wait is recorded (:attr:`Accelerator.waits`);
- a copy to the host that does not wait arrives later: until then the host's memory holds garbage.

torch has one such device for each process, and its autograd engine starts a thread for it at the first
backward pass: :mod:`tests.played.conftest` runs the tests in a process of their own.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.utils.backend_registration as registration
from torch import Tensor

NAME = "played"
MISSING = (
    ""
    if hasattr(registration, "_setup_privateuseone_for_python_backend")
    else f"torch {torch.__version__} cannot register a device from Python"
)
"""Why there is no played accelerator; "" if there is one."""

_EXTENSION_DEVICE = 12  # kDLExtDev of DLPack, which torch reads as its device for extensions
_MADE = ("empty.memory_format", "empty_strided")
"""Operations that only allocate."""
_VIEWS = ("as_strided", "view", "_reshape_alias", "unfold", "set_.source_Storage", "set_.source_Tensor")
"""Operations of the CPU that read no number, whatever the device: they launch no kernel."""
_FREE = {"record_stream", "_version", "resize_", "set_.source_Storage_storage_offset"}
_WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
    "equal", "bincount", "histc", "_linalg_check_errors",
}  # fmt: skip
"""Operations whose result, or its size, the host has to know."""
_TENSORS_OF_A_LAUNCH = (0, 110, 64, 48, 36, 30)
"""By lists of tensors: how many tensors one launch of a ``_foreach`` kernel of CUDA takes."""
_CONCATENATED = 128
"""How many tensors one launch of ``cat`` takes."""


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("index", ctypes.c_int32))


class _Exchanged(ctypes.Structure):
    """The beginning of a DLTensor."""

    _fields_ = (("data", ctypes.c_void_p), ("device", _Device))


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def on_device(tensor: Tensor) -> Tensor:
    """Return a tensor of the played device that shares the memory of ``tensor``, which is on the host."""
    capsule = torch._C._to_dlpack(tensor)
    _Exchanged.from_address(_pointer(capsule, b"dltensor")).device.type = _EXTENSION_DEVICE
    return torch._C._from_dlpack(capsule)  # type: ignore[no-any-return]


def on_host(tensor: Tensor) -> Tensor:
    """Return a tensor of the host that shares the memory of ``tensor``; valid as long as that lives."""
    plain = _bytes(tensor.untyped_storage()).view(tensor.dtype)
    return plain.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    memory = (ctypes.c_char * max(storage.nbytes(), 1)).from_address(storage.data_ptr() or _nothing)
    return torch.frombuffer(memory, dtype=torch.uint8)[: storage.nbytes()]


_empty = ctypes.create_string_buffer(64)
_nothing = ctypes.addressof(_empty)


class Event:
    """``torch.cuda.Event``: complete once the copies that were issued before it have arrived."""

    def __init__(self) -> None:
        self._due = 0

    def record(self, stream: object = None) -> None:
        self._due = max((due for due, *_ in accelerator.copies), default=0)

    def query(self) -> bool:
        return self._due <= accelerator.now

    def synchronize(self) -> None:
        if not self.query():
            accelerator.waited("Event.synchronize")
        accelerator.arrive(self._due)


class Accelerator:
    """State of the device.

    Attributes:
        kernels: launched kernels, by the name of the operation.
        waits: what the host waited for, by name, since :meth:`watch`.
        now: steps that have passed, by :meth:`pass_step`.
        lateness: steps until a copy to the host arrives.
        copies: (due, host tensor, numbers) of copies on their way.
    """

    def __init__(self) -> None:
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.now, self.lateness = 0, 1
        self.copies: list[tuple[int, Tensor, Tensor]] = []
        self.pinned: WeakValueDictionary[int, Tensor] = WeakValueDictionary()

    def launched(self, name: str, launches: int = 1) -> None:
        self.kernels[name] += launches

    def waited(self, name: str) -> None:
        self.waits[name] += 1

    def arrive(self, until: int) -> None:
        """Deliver the copies that are due."""
        for due, host, numbers in self.copies:
            if due <= until:
                host.copy_(numbers)
        self.copies = [copy for copy in self.copies if copy[0] > until]

    def pass_step(self) -> None:
        """Let the device finish what was given to it ``lateness`` steps ago."""
        self.now += 1
        self.arrive(self.now)

    def send_late(self, host: Tensor, numbers: Tensor) -> None:
        """Copy to ``host`` without waiting: garbage now, ``numbers`` later."""
        whole = host.is_floating_point()
        host.fill_(float("nan") if whole else 85)
        self.copies.append((self.now + self.lateness, host, numbers))

    @contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """The kernels that are launched within."""
        before, found = self.kernels, Counter()
        self.kernels = found
        try:
            yield found
        finally:
            self.kernels = before + found


accelerator = Accelerator()


class Module:
    """``torch.played``, as ``torch.cuda`` is."""

    Event = Event

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def current_stream(self, device: object = None) -> object:
        return None

    def synchronize(self, device: object = None) -> None:
        accelerator.waited("synchronize")

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Random numbers are the host's."""

    def get_rng_state(self, device: object = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: object = None) -> None:
        torch.set_rng_state(state)


def register() -> torch.device:
    """Add the device to torch, once in a process. Returns it."""
    registration._setup_privateuseone_for_python_backend(NAME, backend_module=Module())
    _libraries.append(_kernels())
    _libraries.append(_pin_memory_of_the_host())
    torch.UntypedStorage.clone = _clone  # type: ignore[method-assign]
    return torch.device(NAME, 0)


def _clone(storage: torch.UntypedStorage, clone: Any = torch.UntypedStorage.clone) -> torch.UntypedStorage:
    """Copy memory, as ``deepcopy`` does: torch would ask an allocator that only C++ can provide."""
    if storage.device.type != NAME:
        return clone(storage)  # type: ignore[no-any-return]
    accelerator.launched("copy_")
    return on_device(_bytes(storage).clone()).untyped_storage()


_libraries: list[torch.library.Library] = []  # they unregister when they are freed


def _kernels() -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in torch._C._dispatch_get_all_op_names():
        space, _, own = name.partition("::")
        if space != "aten" or not (has(name, "CPU") or own.startswith("_foreach_")):
            continue
        packet, _, overload = own.partition(".")
        operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
        library.impl(own, _kernel(own, operation), "PrivateUse1")
    library.impl("_copy_from", _copy, "PrivateUse1")
    return library


def _pin_memory_of_the_host() -> torch.library.Library:
    """Let ``pin_memory`` work, which asks an allocator that only C++ can provide."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("is_pinned", lambda tensor, device=None: _is_pinned(tensor), "CPU")
    library.impl("_pin_memory", _pin, "CPU")
    torch.empty, torch.empty_like = map(_pinning, (torch.empty, torch.empty_like))
    return library


def _pinning(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        made = make(*args, **kwargs)
        return _keep(made) if pin_memory else made

    return run


def _is_pinned(tensor: Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() in accelerator.pinned


def _pin(tensor: Tensor, device: object = None) -> Tensor:
    return _keep(tensor.clone())


def _keep(tensor: Tensor) -> Tensor:
    """Remember pinned memory, by its address, as long as it lives."""
    accelerator.pinned[tensor.untyped_storage().data_ptr()] = tensor
    return tensor


def _kernel(name: str, operation: Any) -> Callable[..., Any]:
    """Return the operation of the played device."""
    short = name.partition(".")[0]
    if name in _VIEWS or name in _FREE:
        cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        return lambda *args, **kwargs: operation.redispatch(cpu, *args, **kwargs)
    written = [argument.name for argument in operation._schema.arguments if _is_written(argument)]
    places = {argument.name: at for at, argument in enumerate(operation._schema.arguments)}
    waiting = name in _WAITING or short in _WAITING

    def run(*args: Any, **kwargs: Any) -> Any:
        if name not in _MADE:
            accelerator.launched(name, _launches(short, args))
        sized = kwargs.get("output_size") is not None
        if (
            waiting
            or (short == "repeat_interleave" and not sized)
            or (short.startswith(("index", "_index")) and _has_mask(args))
        ):
            accelerator.waited(name)
        given = [args[places[one]] if places[one] < len(args) else kwargs.get(one) for one in written]
        to_fill = {id(one): torch.empty(0, dtype=one.dtype) for one in given if _is_to_fill(one)}
        read = partial(_unwrap, to_fill)
        made = operation(*map(read, args), **{key: read(value) for key, value in kwargs.items()})
        for one in given:
            if id(one) in to_fill:
                one.set_(on_device(to_fill[id(one)]))
        if not written:
            return _wrap(made)
        if operation._schema.returns:
            return given[0] if len(given) == 1 else tuple(given)
        return None

    return run


def _is_to_fill(value: Any) -> bool:
    """Whether this is a result whose size the operation decides: its memory cannot grow."""
    return isinstance(value, Tensor) and value.device.type == NAME and not value.numel()


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _launches(short: str, args: tuple[Any, ...]) -> int:
    lists = [value for value in args if isinstance(value, (list, tuple)) and _tensors(value)]
    if not lists:
        return 1
    if short == "cat":
        return -(-len(lists[0]) // _CONCATENATED)
    if short.startswith("_foreach_"):
        lists_read = len(lists) + (not short.endswith("_"))  # and the list of results
        return -(-len(lists[0]) // _TENSORS_OF_A_LAUNCH[min(lists_read, 5)])
    return 1


def _tensors(values: Any) -> bool:
    return bool(values) and isinstance(values[0], Tensor)


def _has_mask(args: tuple[Any, ...]) -> bool:
    return any(
        isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8)
        for value in args
        if isinstance(value, (list, tuple))
        for one in value
    )


def _unwrap(to_fill: dict[int, Tensor], value: Any) -> Any:
    """Return an argument as the CPU takes it. ``to_fill``: what stands for results without a size."""
    if isinstance(value, Tensor):
        found = to_fill.get(id(value))
        return found if found is not None else on_host(value) if value.device.type == NAME else value
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == NAME else value
    if isinstance(value, (list, tuple)):
        return type(value)(_unwrap(to_fill, one) for one in value)
    return value


def _wrap(value: Any) -> Any:
    if isinstance(value, Tensor):
        return on_device(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_wrap, value))
    return value


def _copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy between two devices, or on the played one."""
    to_host, from_host = target.device.type != NAME, source.device.type != NAME
    accelerator.launched("copy_")
    if to_host and non_blocking and _is_pinned(target):
        accelerator.send_late(target, on_host(source).clone())
        return target
    if to_host or (from_host and not (non_blocking and _is_pinned(source))):
        accelerator.waited("copy to the host" if to_host else "copy from the host")
    _unwrap({}, target).copy_(_unwrap({}, source))
    return target
