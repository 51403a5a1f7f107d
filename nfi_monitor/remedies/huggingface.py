"""Compute the loss for ``transformers.Trainer(compute_loss_func=...)``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nfi_monitor.remedies.cross_entropy import zero_sum_cross_entropy


def causal_lm_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Return the loss of a causal language model: logits at each token against the next token's label.

    ``outputs.logits`` [B, T, K], ``labels`` [B, T] with −100 where none counts.  With ``num_items_in_batch``
    (the items of all micro-batches of a step) the losses are summed and divided by it, as ``Trainer`` expects
    under gradient accumulation; without it, their mean.  Source and bounds: ``zero_sum_cross_entropy``.
    """
    return _reduced(
        _logits(outputs)[..., :-1, :].flatten(0, -2), labels[..., 1:].flatten(), num_items_in_batch
    )


def classification_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Return the loss of ``outputs.logits`` [..., K] against ``labels`` [...].

    For classifiers, masked language models, token classification and sequence-to-sequence models.  Otherwise
    as :func:`causal_lm_loss`."""
    return _reduced(_logits(outputs).flatten(0, -2), labels.flatten(), num_items_in_batch)


def _logits(outputs: Any) -> Tensor:
    logits: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
    return logits


def _reduced(logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
    labels = labels.to(logits.device)
    if items is None:
        return zero_sum_cross_entropy(logits, labels)
    total = zero_sum_cross_entropy(logits, labels, reduction="sum")
    return total / (items.to(total.device) if isinstance(items, Tensor) else items)
