"""A hook of the monitor is seen by the forward pass alone: not by copies, files and TorchScript."""

from __future__ import annotations

import copy
import copyreg
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import _recursive as scripting

from nfi_monitor import Monitor
from nfi_monitor.capture.model_hooks import ForwardHook, ModelHook
from tests.runs import batch, differences, mlp


class Counter(ModelHook):
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.calls += 1


def watched(model: nn.Module) -> Monitor:
    monitor = Monitor(model, torch.optim.AdamW(model.parameters()), console=False, every=1)
    monitor.observe_outputs()
    return monitor


def saved(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


def test_a_saved_model_is_byte_for_byte_the_one_without_a_monitor() -> None:
    model = mlp()
    bare, pickled = saved(model), pickle.dumps(model)
    with watched(model):
        assert saved(model) == bare and pickle.dumps(model) == pickled
        with torch.serialization.safe_globals([*kinds(model)]):
            loaded = torch.load(io.BytesIO(saved(model)), weights_only=True)
    assert torch.equal(loaded(batch()[0]), model(batch()[0]))


def kinds(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules()}


def test_the_hooks_of_others_stay_in_copies_in_their_order_and_can_be_removed() -> None:
    layer, seen = nn.Linear(3, 2), []
    layer.register_forward_hook(_first)
    ours = ForwardHook(layer, counter := Counter())
    ours.register()
    handle = layer.register_forward_hook(_second, with_kwargs=True, always_call=True)
    for other in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert list(other._forward_hooks.values()) == [_first, _second]
        assert list(other._forward_hooks_with_kwargs) == list(other._forward_hooks_always_called)
        other(torch.zeros(1, 3))
    assert counter.calls == 0 and len(layer._forward_hooks) == 3
    layer(torch.zeros(1, 3))
    assert counter.calls == 1
    handle.remove()
    ours.remove()
    ours.remove()
    assert list(layer._forward_hooks.values()) == [_first] and not layer._forward_hooks_with_kwargs
    assert not seen


def _first(*_: Any) -> None: ...


def _second(*_: Any) -> None: ...


def test_nothing_is_left_in_pickle_or_torch_after_the_last_hook() -> None:
    table = dict(copyreg.dispatch_table)
    functions = [scripting.infer_concrete_type_builder, scripting.get_hook_stubs]
    layers = [nn.Linear(3, 2), nn.Linear(3, 2), nn.Bilinear(1, 1, 1)]
    hooks = [ForwardHook(layer, Counter()) for layer in layers]
    for hook in hooks:
        hook.register()
    assert set(copyreg.dispatch_table) - set(table) == {nn.Linear, nn.Bilinear}
    for hook in hooks:
        hook.remove()
    assert copyreg.dispatch_table == table
    assert functions == [scripting.infer_concrete_type_builder, scripting.get_hook_stubs]


class Own(nn.Linear):
    """A class with a state and a reducer of its own."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "extra": 7}


def test_a_state_and_a_reducer_of_the_users_own_are_used_and_put_back() -> None:
    layer, called = Own(3, 2), []

    def reducer(module: Own) -> Any:
        called.append(module)
        return module.__reduce_ex__(2)

    copyreg.pickle(Own, reducer)  # type: ignore[arg-type]
    try:
        hook = ForwardHook(layer, Counter())
        hook.register()
        other = copy.deepcopy(layer)
        assert other.extra == 7 and not other._forward_hooks and called == [layer]
        hook.remove()
        assert copyreg.dispatch_table[Own] is reducer
    finally:
        del copyreg.dispatch_table[Own]


class Branch(nn.Module):
    """Needs script, not trace; its head gets keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(12, 8), nn.Linear(8, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        if h.sum() > 0:
            h = h.relu()
        return self.head(h)


@pytest.mark.parametrize("model", [mlp(), Branch()], ids=["mlp", "branch"])
def test_torchscript_compiles_and_traces_a_watched_model_as_without_a_monitor(model: nn.Module) -> None:
    inputs, _ = batch()
    bare = str(torch.jit.script(model).inlined_graph)
    with watched(model) as monitor:
        scripted = torch.jit.script(model)
        assert str(scripted.inlined_graph) == bare
        assert torch.equal(scripted(inputs), model(inputs))
        scripted.train()(inputs).sum().backward()
        if not isinstance(model, Branch):
            assert "aten::detach" not in str(torch.jit.trace(model, inputs).inlined_graph)
        assert not monitor._loop.rows.sums and not monitor.notes
    assert isinstance(scripted, torch.jit.ScriptModule)
    assert not list(scripted._forward_hooks.values())


@pytest.mark.parametrize("how", ["backward", "compiled too"])
def test_a_compiled_backward_pass_needs_no_graph_break(how: str) -> None:
    """Compiled autograd with fullgraph=True raises at a graph break."""

    def train(watch: bool) -> list[Tensor]:
        torch._dynamo.reset()
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        monitor = Monitor(model, optimizer, console=False, every=1) if watch else None
        run = torch.compile(model, backend="eager") if how == "compiled too" else model
        inputs, targets = batch()
        compiler = torch.compile(backend="eager", fullgraph=True, dynamic=True)
        for _ in range(7):
            loss = F.cross_entropy(run(inputs), targets)
            with torch._dynamo.compiled_autograd._enable(compiler):
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if monitor is not None:
            (note,) = [note for note in monitor.notes if note.code == "head_never_fired"]
            cause = "the backward pass is compiled" if how == "backward" else "runs inside torch.compile"
            assert cause in note.message
            assert len(monitor.history["zero_sum_violation_weight"][0]) == 7
            monitor.close()
        return [parameter.detach().clone() for parameter in model.parameters()]

    assert all(map(torch.equal, train(False), train(True)))


def test_a_closure_as_hook_is_left_out_too() -> None:
    layer, calls = nn.Linear(3, 2), []
    hook = ForwardHook(layer, lambda module, args, kwargs, output: calls.append(1))
    hook.register()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.jit.script(layer)):
        other(torch.zeros(1, 3))
    layer(torch.zeros(1, 3))
    assert calls == [1]
    hook.remove()
    assert not layer._forward_hooks


def test_a_copy_of_the_hook_alone_does_nothing() -> None:
    counter = Counter()
    for other in (copy.deepcopy(counter), pickle.loads(pickle.dumps(counter))):
        assert other(nn.Identity(), (), {}, None) is None
    assert isinstance(counter, ModelHook) and counter.calls == 0
    assert copy.deepcopy(OrderedDict(a=counter))["a"] is not counter


SCRIPTS = {
    "traced": lambda model: torch.jit.trace(model, batch()[0]),
    "scripted": torch.jit.script,
    "scripted head": lambda model: nn.Sequential(*model[:4], torch.jit.script(model[4])),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tapped", [False, True])
@pytest.mark.parametrize("make", SCRIPTS.values(), ids=SCRIPTS)
def test_a_model_of_torchscript_trains_under_a_monitor_that_says_how_to_see_rows(
    make: Callable[[nn.Module], nn.Module], tapped: bool
) -> None:
    inputs, targets = batch()

    def train(*, watch: bool) -> tuple[dict[str, Any], Monitor | None]:
        model = make(mlp())
        optimizer = torch.optim.AdamW(model.parameters())
        monitor = Monitor(model, optimizer, console=False, every=1) if watch else None
        for _ in range(8):
            optimizer.zero_grad()
            logits = model(inputs)
            if monitor is not None and tapped:
                monitor.tap(logits)
            F.cross_entropy(logits, targets).backward()
            optimizer.step()
        if monitor is not None:
            monitor.close()
        return {name: value.clone() for name, value in model.state_dict().items()}, monitor

    state, monitor = train(watch=True)
    assert monitor is not None and not differences(train(watch=False)[0], state)
    said = {note.code: note.message for note in monitor.notes}
    assert not [code for code in said if code.startswith("failed")]
    assert ("head_never_fired" in said) is not tapped
    assert tapped or "TorchScript, which calls no hook" in said["head_never_fired"]
    rows = monitor.history["live_fraction"][0] if "live_fraction" in monitor.history else ()
    assert len(rows) == (8 if tapped else 0)
