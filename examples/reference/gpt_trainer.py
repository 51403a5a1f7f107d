"""Train on the same text with HuggingFace's Trainer: two runs that differ only in the callback.

This arm uses no training loop of ours. It shows what a user of the Trainer gets, and that the callback does
not change the training. Both runs must end bit for bit equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from examples.reference.packages import require
from examples.reference.text_data import excerpt
from nfi_monitor import Monitor


def train_with_trainer(
    config: Mapping[str, Any], seed: int, device: torch.device, run_dir: Path
) -> dict[str, Any]:
    """Train once with the callback and once without it, and compare.

    Keys of ``config``: tokens, vocabulary, length, rows, width, layers, heads, lr, steps. Raises StudyError
    if transformers or accelerate is missing.
    """
    stream, _ = excerpt(config["tokens"], config["vocabulary"])
    windows = stream[: len(stream) // config["length"] * config["length"]].reshape(-1, config["length"])
    watched, monitor, losses = _train(config, windows, seed, device, run_dir / "watched", watch=True)
    bare, _, _ = _train(config, windows, seed, device, run_dir / "bare", watch=False)
    assert monitor is not None
    summary = monitor.summary()
    return {
        "slingshots": summary["slingshots"],
        "alerts": monitor.alerts,
        "loss": losses,
        "readings": summary["readings"],
        "head": summary["run"]["head"],
        "notes": [note.code for note in monitor.notes],
        "tensors": len(bare),
        "tensors_equal": sum(torch.equal(watched[name], value) for name, value in bare.items()),
        "absorbed_fraction": _last(monitor, "absorbed_fraction"),
        "zero_sum_violation": _last(monitor, "zero_sum_violation"),
    }


def _train(
    config: Mapping[str, Any],
    windows: torch.Tensor,
    seed: int,
    device: torch.device,
    directory: Path,
    *,
    watch: bool,
) -> tuple[dict[str, torch.Tensor], Monitor | None, list[float]]:
    """Run once; return ``(weights and optimizer state by name, monitor, loss per step)``."""
    transformers = require("transformers", "the Trainer")
    require("accelerate", "the Trainer")
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config["vocabulary"],
            n_positions=config["length"],
            n_embd=config["width"],
            n_layer=config["layers"],
            n_head=config["heads"],
            loss_type="ForCausalLM",
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(directory),
        max_steps=config["steps"],
        per_device_train_batch_size=config["rows"],
        learning_rate=config["lr"],
        adam_beta2=0.95,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        seed=seed,
    )
    callback = None
    if watch:
        from nfi_monitor.integrations.transformers import NFICallback

        callback = NFICallback(console=False)
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in windows],
        callbacks=None if callback is None else [callback],
    )
    trainer.pop_callback(transformers.PrinterCallback)
    trainer.train()
    state = {f"model.{name}": value.detach().cpu() for name, value in model.state_dict().items()}
    for index, tensors in trainer.optimizer.state_dict()["state"].items():
        state |= {
            f"optimizer.{index}.{name}": torch.as_tensor(value).cpu() for name, value in tensors.items()
        }
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return state, None if callback is None else callback.monitor, losses


def _last(monitor: Monitor, name: str) -> float | None:
    values = monitor.history[name][1]
    return float(values[-1]) if len(values) else None
