"""A step never waits for the device on the monitor's account, nor holds a second tensor of the logits' size.

No accelerator is needed to see this: told that no tensor lies on the host, the monitor goes the way that it
goes on one, and every operation it calls is looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nfi_monitor import Monitor
from nfi_monitor.capture import devices
from nfi_monitor.capture.host_transfer import HostTransfer
from nfi_monitor.capture.sampling import CoordinateSample
from nfi_monitor.engine import step_reader
from nfi_monitor.engine.contents import Contents
from nfi_monitor.measure.sharded.step import head_parts, step_parts
from nfi_monitor.native import library
from tests.measure.late import unexpected
from tests.measure.sharded.test_step import SHAPES, D, update_of
from tests.own_optimizers import Nested, Own

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default")
"""Operations; those of a CPU tensor that only fetch it dispatch none, and are seen as calls."""
FETCHING = {
    torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__bool__,
    torch.Tensor.__float__, torch.Tensor.__int__, torch.Tensor.__index__, torch.Tensor.__array__,
}  # fmt: skip
MAKING = ("tensor", "as_tensor", "asarray")
"""Functions of torch that copy the host's numbers to another device without dispatching an operation."""
CLASSES, ROWS = 4_096, 512


class Operations(TorchDispatchMode):
    """Counts what would wait, and what would be waited for on its way to the device, and notes the largest
    tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()
        self.called: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = str(operation)
        self.called[name] += 1
        if any(word in name for word in WAITING):
            self.waited[name] += 1
        if name.startswith(("aten._to_copy", "aten.copy_")) and _from_host(result, *args, **kwargs or {}):
            self.sent[name] += 1
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            # Views make nothing.
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self.largest = max(self.largest, tensor.numel())
        return result


def _from_host(result: torch.Tensor, *args: Any, non_blocking: bool = False, **_: Any) -> bool:
    """Of a copy: whether the host waits until another device has it."""
    *_, source = (x for x in args if isinstance(x, torch.Tensor))
    late = non_blocking or args[-1] is True
    return source.device.type == "cpu" != result.device.type and not late


@contextmanager
def made(sent: Counter[str]):
    """Counts tensors that are made on another device of the host's numbers, also from inside of torch."""

    def counting(make):
        def run(given: Any, *arguments: Any, **options: Any) -> torch.Tensor:
            tensor = make(given, *arguments, **options)
            if tensor.device.type != "cpu" and not isinstance(given, torch.Tensor):
                sent[make.__name__] += 1
            return tensor

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in MAKING:
            patch.setattr(torch, name, counting(getattr(torch, name)))
        yield


class Calls(TorchFunctionMode):
    """Counts calls that fetch a tensor's numbers, on whatever device it lies."""

    def __init__(self, waited: Counter[str]) -> None:
        super().__init__()
        self.waited = waited

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        to_host = function is torch.Tensor.to and any(
            str(x) == "cpu" for x in (*args[1:], *kwargs.values()) if isinstance(x, (str, torch.device))
        )
        if function in FETCHING or to_host:
            self.waited[getattr(function, "__name__", str(function))] += 1
        return function(*args, **kwargs)


@contextmanager
def looked_at(monitor: Monitor, operations: Operations):
    """Only what the monitor's own hooks do, those at the gradient included."""
    originals = {name: getattr(monitor._loop, name) for name in ("_before_step", "_after_step")}
    probe_call, deliver = type(monitor._loop.probe).__call__, monitor._loop.probe._deliver

    def within(function):
        def run(*arguments: Any) -> Any:
            with operations, Calls(operations.waited), made(operations.sent):
                return function(*arguments)

        return run

    register = torch.Tensor.register_hook

    def register_hook(tensor: torch.Tensor, hook: Any) -> Any:
        own = hook.__module__.startswith("nfi_monitor.")
        return register(tensor, within(hook) if own else hook)

    steps = monitor._loop.hooks.step
    steps._before, steps._after = (within(originals[name]) for name in originals)
    monitor._loop.probe._deliver = within(deliver)
    type(monitor._loop.probe).__call__ = lambda self, *arguments: within(probe_call.__get__(self))(*arguments)
    torch.Tensor.register_hook = register_hook  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.register_hook = register  # type: ignore[method-assign]
        type(monitor._loop.probe).__call__ = probe_call
        monitor._loop.probe._deliver = deliver


def train(monitor: Monitor, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    torch.manual_seed(1)
    inputs, targets = torch.randn(ROWS, 8), torch.randint(CLASSES, (ROWS,))
    for _ in range(steps):
        loss = F.cross_entropy(model(inputs), targets)
        monitor.observe_loss(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Nothing lies on the host; packed numbers arrive when the test says so."""
    monkeypatch.setattr(devices, "on_host", lambda tensor: False)
    taken: list[int] = []
    monkeypatch.setattr(HostTransfer, "take", lambda self, **_: taken.append(1) or [])
    with library.disabled():  # it reads the host's memory
        yield taken


@pytest.mark.parametrize("arguments", [{}, {"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("every", ["auto", 1])
def test_neither_a_healthy_step_nor_a_reading_waits_for_the_device(elsewhere, arguments, every) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    # Capturable: the step counts on the device, as with fused steps.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **arguments)
    operations = Operations()
    with Monitor(model, optimizer, console=False, every=every) as monitor:
        train(monitor, model, optimizer, 2)
        with looked_at(monitor, operations):
            train(monitor, model, optimizer, 40 if every == "auto" else 12)
        assert not [note for note in monitor.notes if note.code.startswith("failed")]
    assert elsewhere
    assert not operations.waited


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: torch.tensor(x.item()),
        lambda x: torch.tensor(x.tolist()),
        lambda x: x.to("cpu"),
        lambda x: x.to(device=torch.device("cpu")),
        lambda x: x.cpu(),
        lambda x: torch.as_tensor(x.numpy()),
        lambda x: x * (1 if x else 2),
        lambda x: torch.tensor(float(x)),
    ],
    ids=["item", "tolist", "to", "to device", "cpu", "numpy", "bool", "float"],
)
def test_a_call_that_waits_would_be_seen(elsewhere, monkeypatch: pytest.MonkeyPatch, wait) -> None:
    from nfi_monitor.measure import weight_norm

    torch.manual_seed(0)
    model = nn.Linear(8, CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    operations = Operations()
    real = weight_norm.norm
    monkeypatch.setattr(weight_norm, "norm", lambda *a: wait(real(*a)))
    with (
        Monitor(model, optimizer, console=False, every=1) as monitor,
        looked_at(monitor, operations),
    ):
        train(monitor, model, optimizer, 2)
    assert operations.waited


def of_rows(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def of_positions(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The classes come first in the gradient: it has no view as rows."""
    return F.cross_entropy(logits.transpose(1, 2), targets)


@pytest.mark.parametrize("loss_of", [of_rows, of_positions])
@pytest.mark.parametrize("tapped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reading_never_makes_a_second_tensor_of_the_logits_size(loss_of, tapped, dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, CLASSES, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    operations = Operations()
    inputs, targets = torch.randn(4, ROWS // 4, 8, dtype=dtype), torch.randint(CLASSES, (4, ROWS // 4))
    with (
        Monitor(model, optimizer, console=False, every=1) as monitor,
        looked_at(monitor, operations),
    ):
        for _ in range(4):
            logits = model(inputs)
            loss = loss_of(monitor.tap(logits) if tapped else logits, targets)
            monitor.observe_loss(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert len(monitor.history["zero_sum_violation"][0]) == 4
        assert not [note for note in monitor.notes if note.code.startswith("failed")]
    # 2^18 logits are read of 2^21: one row in eight.
    assert ROWS * CLASSES // 8 <= operations.largest <= ROWS * CLASSES // 4


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that is not the host and takes copies late, as CUDA does; it only computes nothing."""

    def send(numbers: Any, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.as_tensor(numbers, dtype=dtype).to(device, non_blocking=True)

    monkeypatch.setattr(HostTransfer, "take", lambda self, **_: [])
    monkeypatch.setattr(devices, "send", send)
    monkeypatch.setattr(step_reader, "full_precision", lambda tensor: nullcontext())  # it knows no autocast
    return torch.device("meta")


def names_in(contents: Contents, packed: torch.Tensor) -> set[str]:
    """The quantities that a packed vector becomes on the host."""
    return set(contents.unpack(torch.zeros(len(packed)), unexpected))


def train_on(device: torch.device, own: dict[str, float], operations: Operations) -> None:
    """On logits with the classes second; ``own``: of the head's parameter group."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, CLASSES)).to(device)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), **own}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    inputs = torch.zeros(4, ROWS // 4, 8, device=device)
    targets = torch.zeros(4, ROWS // 4, dtype=torch.int64, device=device)
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        with looked_at(monitor, operations):
            for _ in range(3):
                loss = of_positions(model(inputs), targets)
                monitor.observe_loss(loss)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        assert not [note for note in monitor.notes if note.code.startswith("failed")]
        contents, packed = monitor._loop.transfer._pending[-1][:2]
        assert (
            contents.late_rows
            and "secant_curvature" in names_in(contents, packed)
            and packed.device == device
        )


@pytest.mark.parametrize("own", [{}, {"lr": 1e-2}, {"lr": 1e-2, "eps": 1e-6, "betas": (0.9, 0.99)}], ids=str)
def test_numbers_of_the_host_reach_the_device_without_waiting_for_it(device, own: dict[str, float]) -> None:
    operations = Operations()
    train_on(device, own, operations)
    assert not operations.sent


@pytest.mark.parametrize("kind", [Own, Nested])
def test_a_second_moment_is_checked_without_waiting_for_the_device(device, kind) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, CLASSES)).to(device)
    optimizer = kind(model.parameters())
    inputs, targets = torch.zeros(ROWS, 8, device=device), torch.zeros(ROWS, dtype=torch.int64, device=device)
    operations = Operations()
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        with looked_at(monitor, operations):
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
        assert not [note for note in monitor.notes if note.code.startswith("failed")]
        assert monitor._loop.reader.check._transfer.waiting
    assert operations.called and not operations.sent and not operations.waited


def test_rows_are_recomputed_without_waiting_for_the_device(elsewhere) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs, targets = torch.randn(ROWS, 8), torch.zeros(ROWS, dtype=torch.int64)
    operations = Operations()
    with Monitor(model, optimizer, console=False, every=1) as monitor:

        def step() -> None:
            hidden = monitor.tap_features(model[1](model[0](inputs)), targets)
            hidden.square().mean().backward()
            optimizer.step()

        for _ in range(3):
            step()
        with looked_at(monitor, operations):
            step()
        assert not [note for note in monitor.notes if note.code.startswith("failed")]
        assert monitor._loop.transfer._pending[-1][0].late_rows and monitor._loop.probe.recomputed == 4
    assert elsewhere and not operations.waited
    assert 64 * CLASSES <= operations.largest <= 3 * 64 * CLASSES < ROWS * CLASSES, "never all logits"


@pytest.mark.parametrize("passes", [1, 3])
def test_backward_passes_are_added_up_without_waiting_for_the_device(elsewhere, passes: int) -> None:
    model = nn.Linear(8, CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    operations = Operations()
    with Monitor(model, optimizer, console=False, every=1) as monitor:

        def step() -> None:
            logits = model(torch.randn(ROWS, 8))
            for _ in range(passes):
                logits.logsumexp(-1).mean().backward(retain_graph=True)
            optimizer.step()

        for _ in range(3):
            step()
        with looked_at(monitor, operations):
            step()
        assert not [note for note in monitor.notes if note.code.startswith("failed")]
        assert monitor._loop.transfer._pending[-1][0].late_rows
    assert elsewhere and not operations.waited
    # Of the sampled rows only, an eighth: gradient and logits go to the host in one vector.
    assert operations.largest <= ROWS * CLASSES // 3


def test_a_part_of_a_step_is_made_ready_for_other_ranks_without_waiting_for_the_device(device) -> None:
    update = update_of(None, 1)[0]
    there = {name: x.to(device) for name, x in vars(update).items() if isinstance(x, torch.Tensor)}
    tensors = [torch.empty(shape, device=device) for shape in SHAPES]
    operations = Operations()
    with operations, made(operations.sent):
        update = replace(update, **there, sample=CoordinateSample(tensors))
        assert update.sample.segments.device == device
        step_parts(update, range(len(SHAPES)), [0.5] * len(SHAPES), len(SHAPES), None, 1)
        parts = head_parts(update, 0.5, (D, D, 3), torch.ones(3, D), torch.ones(D))
    assert parts.extremes.device == device
    assert operations.called and not operations.sent


def test_of_step_counts_on_the_device_one_is_read_for_all_tensors(elsewhere) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)), nn.Linear(8, CLASSES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    operations = Operations()
    with Monitor(model, optimizer, console=False, every=1) as monitor, looked_at(monitor, operations):
        train(monitor, model, optimizer, 2)
    assert operations.called["aten.pow.Scalar"] == 2


def test_a_loss_of_the_host_beside_a_reading_of_the_device_is_known_at_once(device) -> None:
    model = nn.Linear(8, CLASSES, device=device)
    optimizer = torch.optim.AdamW(model.parameters())
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for told in (0.1, 0.2):
            loss = model(torch.zeros(ROWS, 8, device=device)).logsumexp(-1).mean()
            monitor.observe_loss(torch.tensor(told, dtype=torch.float64))
            loss.backward()
            optimizer.step()
        assert [label.known["loss"] for label, *_ in monitor._loop.transfer._pending] == [0.1, 0.2]
        assert monitor._loop.transfer._pending[-1][1].device == device
        assert not [note for note in monitor.notes if note.code.startswith("failed")]


@pytest.mark.parametrize("head_on", ["the device", "the host"])
def test_features_come_to_the_head_or_are_said_to_lie_elsewhere(device, head_on: str) -> None:
    """Rows of the accelerator whose head's weight is kept on the host would have to be waited for."""
    there, beside = (device, "cpu") if head_on == "the device" else ("cpu", device)
    model = nn.Linear(8, CLASSES, device=there)
    optimizer = torch.optim.AdamW(model.parameters())
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(2):
            model(torch.zeros(ROWS, 8, device=there)).logsumexp(-1).mean().backward()
            monitor._loop.step_reader.finish_rows()
            rows = monitor._loop.rows
            rows.features, total, count = (
                torch.zeros(x.shape, device=beside) for x in (rows.features, *rows.feature_total)
            )
            rows._feature_sum, rows._feature_count = total, count
            optimizer.step()
        names = names_in(*monitor._loop.transfer._pending[-1][:2])
        assert "secant_curvature" in names
        assert ("logit_displacement" in names) == ("feature_displacement" in names) == (there == device)
        assert bool(monitor._loop.reader.unreadable) == (there == "cpu")
        assert not [note for note in monitor.notes if note.code.startswith("failed")]


@pytest.mark.parametrize("stray", ["loss", "tapped logits"])
def test_parts_of_a_reading_that_lie_on_two_devices_come_in_one_vector(device, stray: str) -> None:
    model = nn.Linear(8, CLASSES)
    optimizer = torch.optim.AdamW(model.parameters())
    operations = Operations()
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        with looked_at(monitor, operations):
            for _ in range(3):
                logits = model(torch.zeros(ROWS, 8))
                if stray == "loss":
                    monitor.observe_loss(torch.zeros((), device=device))
                else:
                    monitor.tap(logits.detach().to(device).requires_grad_()).logsumexp(-1).sum().backward()
                logits.logsumexp(-1).mean().backward()
                optimizer.step()
        contents, packed, _ = monitor._loop.transfer._pending[-1]
        assert packed.device == device and (contents.rows or contents.late_rows)
        assert "secant_curvature" in names_in(contents, packed)
        assert ("loss" in contents.names) == (stray == "loss")
        assert not operations.sent
        assert not [note for note in monitor.notes if note.code.startswith("failed")]


@pytest.mark.parametrize(
    "copy",
    [
        lambda device: torch.tensor([1.0], device=device),
        lambda device: torch.as_tensor(1.0, device=device),
        lambda device: torch.ones(1).to(device),
        lambda device: torch.ones(1, device=device).copy_(torch.ones(1)),
        lambda device: torch.unravel_index(torch.arange(6, device=device), (2, 3)),
    ],
    ids=["tensor", "as_tensor", "to", "copy_", "inside torch"],
)
def test_a_copy_to_the_device_that_waits_would_be_seen(device, copy: Any) -> None:
    operations = Operations()
    with operations, made(operations.sent):
        torch.ones(1).to(device, non_blocking=True)
        torch.ones(1, device=device).copy_(torch.ones(1, device=device))
        assert not operations.sent
        copy(device)
    assert operations.sent


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("own", [{}, {"lr": 1e-2}, {"lr": 1e-2, "eps": 1e-6}], ids=str)
def test_on_an_accelerator_torch_itself_finds_no_synchronisation(own: dict[str, float]) -> None:
    """``own``: of the head's parameter group."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, CLASSES)).cuda()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), **own}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=not own)  # fused steps count on the device
    inputs, targets = torch.randn(ROWS, 8).cuda(), torch.randint(CLASSES, (ROWS,)).cuda()
    with Monitor(model, optimizer, console=False) as monitor:
        for step in range(40):
            if step == 8:
                torch.cuda.set_sync_debug_mode("error")
            loss = F.cross_entropy(model(inputs), targets)
            monitor.observe_loss(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.cuda.set_sync_debug_mode("default")
        assert not [note for note in monitor.notes if note.code.startswith("failed")]


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (2, 3, 2, 5)])
def test_rows_of_a_gradient_without_a_view_as_rows_are_those_of_its_copy(shape: tuple[int, ...]) -> None:
    from nfi_monitor.capture.head_probe import rows_of

    turned = torch.randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    for first, stride in ((0, 1), (1, 2), (2, 3)):
        expected = turned.reshape(-1, shape[-1])[first::stride]
        assert torch.equal(rows_of(turned, first, stride), expected)
        assert torch.equal(rows_of(turned.contiguous(), first, stride), expected)


def test_a_hook_leaves_at_once_while_a_cuda_graph_is_captured(elsewhere, monkeypatch) -> None:
    """The warm-up has left a reading on its way: to ask for its event makes the user's capture fail."""
    captured = [False]
    monkeypatch.setattr(devices, "GRAPHS", True)
    monkeypatch.setattr(devices, "capturing", lambda: captured[0])
    torch.manual_seed(0)
    model = nn.Linear(8, CLASSES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    operations = Operations()
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        train(monitor, model, optimizer, 3)
        taken, waiting, captured[0] = len(elsewhere), len(monitor._loop.transfer._pending), True
        with looked_at(monitor, operations):
            train(monitor, model, optimizer, 1)
            monitor.tap(model(torch.randn(ROWS, 8))).sum().backward()
        assert (len(elsewhere), len(monitor._loop.transfer._pending)) == (taken, waiting)
        assert (operations.largest, +operations.waited) == (0, Counter())
        assert (monitor.step, monitor._loop.losses.observed, monitor._loop.rows.sums) == (3, [], None)
        captured[0] = False
        train(monitor, model, optimizer, 2)
        assert monitor.step == 5 and len(monitor._loop.transfer._pending) > waiting
        assert [(note.code, note.step) for note in monitor.notes] == [("cuda_graph", 3)]


def test_whether_a_graph_is_captured_is_asked_only_where_cuda_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The question would set CUDA up in a process that trains on the CPU, or fail in a forked worker."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for graphs, initialized in ((False, True), (True, False), (True, True)):
        monkeypatch.setattr(devices, "GRAPHS", graphs)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda initialized=initialized: initialized)
        assert devices.capturing() is (graphs and initialized)
