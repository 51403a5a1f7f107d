"""Copy to host memory all state that a run needs to continue from one of its steps.

A snapshot is restored *in place*: the same parameters, state tensors and parameter groups get their old
values back.  Rejected: ``load_state_dict``, because it casts optimizer state to the parameters' dtype and
replaces the groups, so the continued run may differ in the last bits.  Non-persistent buffers are copied,
too, because a replay changes them.
"""

from __future__ import annotations

import copy
import math
import os
import pickle
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nfi_monitor.atomic_write import replacing
from nfi_monitor.capture.unwrap import unwrap
from nfi_monitor.deprecation import renamed_keyword

_FORMAT = 1


@dataclass(frozen=True)
class Snapshot:
    """The state after optimizer step ``step``; :meth:`restore` continues from there."""

    step: int
    model: dict[str, Any]
    """``parameters`` and ``buffers`` {name: tensor in host memory}, ``training`` {module's name: mode}."""
    optimizer: dict[str, Any]
    """The form of ``optimizer.state_dict()``, with tensors in host memory."""
    extras: tuple[dict[str, Any], ...]
    """States of the objects given as ``stateful``, in their order."""
    rng: dict[str, Any]
    """Random states of torch (CPU, and CUDA if it is in use), ``random`` and ``numpy.random``."""
    spike: dict[str, Any] | None
    """State of the spike detector at this step; None if no monitor watched the loss."""
    nbytes: int
    lrs: tuple[Any, ...] = ()
    """Learning rate of each group *in* step ``step``. A scheduler may have changed it since."""
    second_moment_decay: float = 0.0
    """The quantity of this name at this step: decades by which the head's sqrt(v̂) has fallen, ≤ 0."""

    @classmethod
    @renamed_keyword("extras", "stateful")
    def take(
        cls,
        step: int,
        model: nn.Module,
        optimizer: Any,
        stateful: Sequence[Any] = (),
        spike: Mapping[str, Any] | None = None,
        *,
        second_moment_decay: float = 0.0,
        to_host: Callable[[Tensor], Tensor] | None = None,
    ) -> Snapshot:
        """Copy the state to host memory. Draws no random number and changes nothing.

        ``stateful``: other objects that a step changes: learning-rate scheduler, gradient scaler, sampler,
        average of the weights (anything with ``state_dict``/``load_state_dict``, or a ``torch.Generator``).
        ``second_moment_decay``: decades by which a replay raises the second moment before it holds it.
        ``to_host`` copies one tensor (default: a blocking copy).  Raises TypeError for other objects.
        """
        to_host = to_host or _to_host
        unwrapped = unwrap(optimizer)
        with torch.no_grad():
            parts: dict[str, Any] = {
                "model": {
                    "parameters": {n: to_host(p) for n, p in model.named_parameters()},
                    "buffers": {n: to_host(b) for n, b in model.named_buffers()},
                    "training": {n: module.training for n, module in model.named_modules()},
                },
                "optimizer": _optimizer_state(unwrapped, to_host),
                "extras": tuple(_copied(_state_of(extra), to_host) for extra in stateful),
                "rng": _rng_state(),
            }
        return cls(
            step=step,
            **parts,
            spike=None if spike is None else dict(spike),
            nbytes=sum(tensor.numel() * tensor.element_size() for tensor in _tensors(parts)),
            lrs=tuple(_copied(group.get("lr"), to_host) for group in unwrapped.param_groups),
            second_moment_decay=second_moment_decay if math.isfinite(second_moment_decay) else 0.0,
        )

    @renamed_keyword("extras", "stateful")
    def completed(self, optimizer: Any, stateful: Sequence[Any] = ()) -> Snapshot:
        """Return this snapshot with the present hyperparameters and states of ``stateful`` objects.

        Schedulers, scalers and weight averages change after the optimizer's step, so a snapshot that was
        taken inside the step needs their later state.  Generators, samplers and loaders have by then moved on
        to the next batch, so the snapshot keeps their earlier state.
        """
        states = tuple(
            old if feeds_data(extra) else _copied(_state_of(extra), _to_host)
            for old, extra in zip(self.extras, stateful, strict=True)
        )
        groups = [
            {name: _copied(value, _to_host) for name, value in group.items() if name != "params"}
            | {"params": old["params"]}
            for old, group in zip(self.optimizer["param_groups"], unwrap(optimizer).param_groups, strict=True)
        ]
        return replace(self, optimizer={**self.optimizer, "param_groups": groups}, extras=states)

    @renamed_keyword("extras", "stateful")
    def restore(self, model: nn.Module, optimizer: Any, stateful: Sequence[Any] = ()) -> None:
        """Restore the state in place, also the random state. May be called any number of times.

        Raises ValueError, before anything is changed, if the model, the parameter groups or the number of
        ``stateful`` objects differ from those of the snapshot.
        """
        optimizer = unwrap(optimizer)
        parameters = dict(model.named_parameters())
        self._check(parameters, optimizer, stateful)
        with torch.no_grad():
            for name, value in self.model["parameters"].items():
                parameters[name].copy_(value)
            _restore_buffers(model, self.model["buffers"])
            for name, module in model.named_modules():
                module.training = self.model["training"].get(name, module.training)
            _restore_optimizer(optimizer, self.optimizer)
        for extra, state in zip(stateful, self.extras, strict=True):
            # A copy, because a scheduler keeps the lists that it loads, and changes them later.
            _load_into(extra, _copied(state, _to_host))
        _restore_rng(self.rng)  # last, because a loader's load_state_dict may draw random numbers

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to ``path`` atomically: after a crash there is the old file, the new one or none."""
        content = {"format": _FORMAT, **{name: getattr(self, name) for name in self.__dataclass_fields__}}
        with replacing(Path(path)) as file:
            torch.save(content, file)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, trusted: bool = False) -> Snapshot:
        """Read a file that :meth:`save` wrote. Raises ValueError for other files.

        Only tensors and plain types are unpickled.  With ``trusted=True`` the file may run code: some
        schedulers and samplers keep other objects in their state.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=not trusted)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} holds more than tensors and plain types ({str(error).splitlines()[0]}). If you "
                "wrote it yourself: Snapshot.load(path, trusted=True)."
            ) from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"{path} is no snapshot of this version. Pass what snapshot.save(path) wrote.")
        return cls(**{name: content[name] for name in cls.__dataclass_fields__ if name in content})

    def _check(self, parameters: Mapping[str, Tensor], optimizer: Any, stateful: Sequence[Any]) -> None:
        def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
            return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

        here, there = shapes(parameters), shapes(self.model["parameters"])
        if here != there:
            odd = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
            raise ValueError(
                f"The snapshot of step {self.step} is of another model: {', '.join(odd[:5])} "
                f"{'differs' if len(odd) == 1 else 'differ'} in name or shape. Pass the model it is of."
            )
        groups = [len(group["params"]) for group in optimizer.param_groups]
        known = [len(group["params"]) for group in self.optimizer["param_groups"]]
        if groups != known:
            raise ValueError(
                f"The snapshot of step {self.step} has {len(known)} parameter group(s) of {known} tensors, "
                f"the optimizer has {len(groups)} of {groups}. Take one after the last group was added."
            )
        if len(stateful) != len(self.extras):
            raise ValueError(
                f"The snapshot of step {self.step} holds the states of {len(self.extras)} stateful objects, "
                f"{len(stateful)} were given. Pass the same objects in the same order."
            )


def feeds_data(item: Any) -> bool:
    """Return whether an object provides data (generator, sampler, loader), so changes before its step."""
    return isinstance(item, torch.Generator) or hasattr(type(item), "__iter__")


def state_bytes(model: nn.Module, optimizer: Any) -> int:
    """Estimate the bytes of a snapshot; before the first step, two moments are assumed."""
    tensors = [*model.parameters(), *model.buffers()]
    state = sum(_size(tensor) for tensor in _tensors([*unwrap(optimizer).state.values()]))
    return sum(map(_size, tensors)) + (state or 2 * sum(map(_size, model.parameters())))


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


# --- copies -----------------------------------------------------------------------------------------


def _to_host(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.clone() if tensor.device.type == "cpu" else tensor.cpu()


def _copied(value: Any, to_host: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy that shares nothing with ``value``, with tensors in host memory."""
    if isinstance(value, Tensor):
        return to_host(value)
    if isinstance(value, np.generic):
        return value.item()  # a plain number can be loaded without trusting the file
    if type(value) is dict:
        return {key: _copied(item, to_host) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(item, to_host) for item in value)
    return copy.deepcopy(value)


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def check_stateful(extra: Any) -> None:
    """Raise TypeError for an object whose state cannot be copied and restored."""
    if not isinstance(extra, torch.Generator) and not (
        hasattr(extra, "state_dict") and hasattr(extra, "load_state_dict")
    ):
        raise TypeError(
            f"stateful holds a {type(extra).__name__}, which has no state_dict and load_state_dict. Pass "
            "schedulers, gradient scalers, samplers, weight averages or torch.Generators."
        )


def _state_of(extra: Any) -> Any:
    check_stateful(extra)
    if isinstance(extra, torch.Generator):
        return {"generator": extra.get_state()}
    state = extra.state_dict()
    return dict(state) if isinstance(state, Mapping) else state  # an OrderedDict loads as a plain one


def _load_into(extra: Any, state: Any) -> None:
    if isinstance(extra, torch.Generator):
        extra.set_state(state["generator"])
    else:
        extra.load_state_dict(state)


def _restore_buffers(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    buffers = dict(model.named_buffers())
    for name, value in values.items():
        buffer = buffers.get(name)
        if buffer is not None and buffer.shape == value.shape and buffer.dtype == value.dtype:
            buffer.copy_(value)
            continue
        owner, _, attribute = name.rpartition(".")  # a cache that grew, or was removed
        module = model.get_submodule(owner)
        device = buffer.device if buffer is not None else next(model.parameters(), value).device
        module._buffers[attribute] = value.to(device, copy=True)


# --- optimizer --------------------------------------------------------------------------------------


def _optimizer_state(optimizer: torch.optim.Optimizer, to_host: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Return ``optimizer.state_dict()``, without the hooks by which sharded optimizers gather all ranks."""
    order = {
        id(param): index
        for index, param in enumerate(p for group in optimizer.param_groups for p in group["params"])
    }
    return {
        "state": {
            order[id(param)]: _copied(dict(state), to_host)
            for param, state in optimizer.state.items()
            if id(param) in order
        },
        # What belongs to no parameter: some optimizers count their steps so.
        "shared": {key: _copied(value, to_host) for key, value in _shared(optimizer).items()},
        "param_groups": [
            {
                name: [order[id(param)] for param in value] if name == "params" else _copied(value, to_host)
                for name, value in group.items()
            }
            for group in optimizer.param_groups
        ],
    }


def _shared(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state: Mapping[Any, Any] = optimizer.state
    return {key: value for key, value in state.items() if isinstance(key, str)}


def _restore_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    groups = [group for group in optimizer.param_groups for _ in group["params"]]
    for index, (param, group) in enumerate(zip(params, groups, strict=True)):
        state = saved["state"].get(index)
        if state is None:
            optimizer.state.pop(param, None)
            continue
        own = optimizer.state[param]
        for name in [name for name in own if name not in state]:
            del own[name]
        for name, value in state.items():
            # As torch does: the step count stays on the host unless the step runs on the device.
            counts = name == "step" and not (group.get("capturable") or group.get("fused"))
            own[name] = _put(own.get(name), value, torch.device("cpu") if counts else param.device)
    shared = saved.get("shared", {})  # earlier versions saved none
    here: Any = optimizer.state
    for key in [key for key in _shared(optimizer) if key not in shared]:
        del here[key]
    for key, value in shared.items():
        here[key] = _put(here.get(key), value, torch.device("cpu"))
    for group, old in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for name in [name for name in group if name not in old]:
            del group[name]
        for name, value in old.items():
            if name != "params":
                group[name] = _put(group.get(name), value, torch.device("cpu"))


def _put(here: Any, value: Any, device: torch.device) -> Any:
    """Copy ``value`` into the tensor ``here`` if it fits, else into a new one; dicts and lists by parts."""
    if type(value) is dict:
        parts = here if isinstance(here, Mapping) else {}
        return {key: _put(parts.get(key), item, device) for key, item in value.items()}
    if type(value) is list:
        known = here if isinstance(here, list) and len(here) == len(value) else [None] * len(value)
        return [_put(old, item, device) for old, item in zip(known, value, strict=True)]
    if not isinstance(value, Tensor):
        return _copied(value, _to_host)
    if isinstance(here, Tensor) and here.shape == value.shape and here.dtype == value.dtype:
        return here.detach().copy_(value) if here.requires_grad else here.copy_(value)
    return value.to(device, copy=True)


# --- random state -----------------------------------------------------------------------------------


def _rng_state() -> dict[str, Any]:
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if _cuda_in_use() else [],
        "python": random.getstate(),
        # As a tensor: plain types are loaded without trusting the file.
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached),
    }


def _restore_rng(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and _cuda_in_use():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_available() and torch.cuda.is_initialized())
