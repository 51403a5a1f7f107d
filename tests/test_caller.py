"""Messages are worded for the object that the user holds: the monitor, or a callback."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nfi_monitor import Monitor
from nfi_monitor.caller import called_as, for_callback


def test_a_callbacks_user_is_told_to_call_its_monitor() -> None:
    text = "Call monitor.observe_loss(loss). For rows, tap: logits = monitor.tap(logits)."
    assert for_callback(text) == (
        "Call callback.monitor.observe_loss(loss). For rows, tap: logits = callback.monitor.tap(logits). "
        "(callback is your NFICallback.)"
    )


@pytest.mark.parametrize(
    "text",
    [
        "The monitor. It reads.",
        "call callback.monitor.observe_loss(loss), callback being the NFICallback",
        "nfi_monitor.open_monitors() returns the open ones",
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert for_callback(text) == text


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("NFICallback({})", "callback.monitor.tap(logits)"),
        ("watch(accelerator, model, optimizer, {})", " monitor.tap(logits)"),
        ("Monitor(model, optimizer, {})", " monitor.tap(logits)"),
    ],
)
def test_notes_name_what_the_user_holds(call: str, said: str) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8))
    optimizer = torch.optim.Adam(model.parameters())
    with called_as(call):
        monitor = Monitor(model, optimizer, console=False, every=1)
    with monitor:
        for _ in range(7):
            logits = F.normalize(model(torch.randn(6, 4)), dim=-1) @ torch.randn(8, 5)
            (logits.pow(2).sum() + 0 * model[0].bias.sum()).backward()
            optimizer.step()
    texts = [note.message for note in monitor.notes if "monitor." in note.message]
    assert texts and all(("callback.monitor" in text) == ("callback" in said) for text in texts)
