"""Word the notes about the head: which one is watched, what it lacks, and why no rows come from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from nfi_monitor.caller import call_with
from nfi_monitor.capture.model_hooks import is_torchscript
from nfi_monitor.capture.names import inner_names, no_head_text

if TYPE_CHECKING:
    from nfi_monitor.capture.head import Head
    from nfi_monitor.capture.head_layer import Place
    from nfi_monitor.capture.head_probe import HeadProbe
    from nfi_monitor.capture.optimizer import OptimizerReader

WITHOUT_HEAD = (
    "Watched without a head: the optimizer, the norms and the observed loss. Zero-sum, absorption and "
    "margins are not read, and *imminent* by rounding cannot be reached."
)


def at_attach(model: nn.Module, head: Head | None, reader: OptimizerReader) -> Iterator[tuple[str, str]]:
    """Yield (code, message) of the notes about the head that can be made before the first step."""
    if head is None:
        yield "no_head", f"{no_head_text('found none', inner_names(model))} {WITHOUT_HEAD}"
        return
    if head.bare:
        yield "head_parameter", _parameter_text(head)
    if head.others:
        yield "several_heads", several_text(head)
    if any(
        isinstance(one, nn.AdaptiveLogSoftmaxWithLoss) and one.head is head.module for one in model.modules()
    ):
        yield "adaptive_softmax", _ADAPTIVE.format(head.describe())
    if head.waits:
        return
    if head.weight is None:
        yield (
            "head_without_weight",
            f"The head {head.name!r} has no weight matrix of its own (parametrized, adapted, complex, or not "
            "linear): classifier mean, logit displacement and zero-sum of the weight gradient are not "
            "measured, and *imminent* by rounding cannot be reached without probe=. Rows are "
            "watched as usual.",
        )
        return
    if not reader.holds(head.weight):
        why = "is frozen" if not head.weight.requires_grad else "is not among the optimizer's parameters"
        yield (
            "optimizer_without_head",
            f"The head {head.name!r} {why}: its second moment and displacement are not measured. "
            "Rows are still watched. If another optimizer trains the head, pass that one to Monitor. An "
            "optimizer of flat copies of the parameters (DeepSpeed ZeRO, master weights) cannot be read.",
        )
    if head.tied:
        yield (
            "tied_head",
            f"The head {head.name!r} shares its weight with an input embedding. The gradient of that "
            "weight has no zero-sum, so it is not read. Rows do not need it.",
        )


_ADAPTIVE = (
    "The head {} is the first layer of an adaptive softmax: each cluster of rare classes is one class here. "
    "Margins and the loss at the head are those of this layer, not of the whole loss. To show the whole "
    "loss, call monitor.observe_loss(loss) before optimizer.step(): it is judged then."
)


def several_text(head: Head) -> str:
    """Return the note about the heads beside the one that is watched."""
    named = head.others[0].split(" (")[0].removeprefix("layer ")
    return (
        f"The model has several heads. Watched: {head.describe()}, the one with most classes (of equal ones "
        f"the first). Not watched: {', '.join(head.others)}. To watch another: "
        f"{call_with(f'head={named!r}')}. If no loss is reported, the loss at this head is judged alone; to "
        "show the whole loss, call monitor.observe_loss(loss) before optimizer.step()."
    )


def _parameter_text(head: Head) -> str:
    kind = type(head.module).__name__
    return (
        f"The head is a bare parameter: {head.describe()}, {head.outputs} classes. Its logits are looked for "
        f"in the output of {kind}, its features in the autograd graph. Where the graph does not keep the "
        "features, feature mean and displacement are not measured, and *imminent* by rounding cannot be "
        "reached: a note says so."
    )


_WITHOUT_FEATURES = (
    "Feature mean and logit displacement are not measured: *inflating* and *imminent* cannot be reached by "
    "rounding."
)


_TAP = "tap them: logits = monitor.tap(logits)"
_TAP_FEATURES = (
    "pass the loss's hidden states and targets through hidden = monitor.tap_features(hidden, targets)"
)


def elsewhere_text(head: Head, place: Place, change: str) -> str:
    """Return the note that rows are read behind the operation ``change``, which changes the logits."""
    keys = "".join(f"[{key!r}]" for key in place.path)
    where = (
        f"in the model's output{keys}" if place.where == "output" else "at the softmax of the model's loss"
    )
    return (
        f"The logits of {head.describe()} are changed after it ({change}). Rows are read from the changed "
        f"logits, {where}. They have no features of their own. {_WITHOUT_FEATURES} Nothing has to be done."
    )


def changed_text(head: Head, change: str) -> str:
    """Return the note that no rows are read, because ``change`` comes between head and loss."""
    axis = ", class_axis=1" if head.spatial else ""
    return (
        f"The logits of {head.describe()} are changed before the softmax of the loss ({change}). Its rows "
        "are not read: their loss, margins and absorption would not be those of the run. The head's weight "
        f"gradient is read instead, for the zero-sum violation of the whole batch. {_WITHOUT_FEATURES} For "
        f"rows, tap the changed logits: logits = monitor.tap(logits{axis})."
    )


def no_features_text(head: Head | None) -> str:
    """Return the note that no features come with the watched logits, and why."""
    if head is not None and head.bare:
        return (
            f"No features come with the logits of {head.describe()}: they are no plain product with this "
            "matrix (a normalised one makes them?), or the autograd graph does not keep the other factor. "
            f"{_WITHOUT_FEATURES} Rows and optimizer are watched as usual. Nothing has to be done."
        )
    if head is not None and head.spatial:
        return (
            f"A row of {head.describe()} is made of a patch of features (a large kernel, or groups). "
            f"{_WITHOUT_FEATURES} Rows and optimizer are watched as usual. Nothing has to be done."
        )
    return (
        "No features of the same rows come with the watched logits (another layer feeds them, or features "
        f"and logits are on two devices). {_WITHOUT_FEATURES} If another linear layer makes the logits, name "
        f"it: {call_with('head=...')}."
    )


def no_rows_text(probe: HeadProbe, model: nn.Module | None, *, weight_read: bool) -> str:
    """Return the note that says why no rows came in the first readings, and what brings them.

    ``weight_read``: whether the head's weight gradient is read instead.
    """
    cause, cure = _cause(probe, model)
    instead = (
        "Its weight gradient is read instead, for the zero-sum violation of the whole batch. The feature "
        "mean is not read: by rounding, *at risk* stays at *info* and *imminent* cannot be reached."
        if weight_read
        else "Only the optimizer, the norms and the observed loss are watched."
    )
    return f"No rows seen: {cause}. {instead} {cure}"


def _cause(probe: HeadProbe, model: nn.Module | None) -> tuple[str, str]:
    head = probe.head
    if head is None:
        return "no head is watched", "Name one with head=..., or use monitor.tap(logits)."
    tap = "logits = monitor.tap(logits)"
    if probe.sharded:
        return (
            "each rank holds the logits of some classes only (a vocabulary-parallel head)",
            "For rows, let the head gather its logits: ColwiseParallel(output_layouts=Replicate()).",
        )
    if probe.traced:
        return (
            "the head runs inside torch.compile, where a hook would break the graph",
            "For rows, tap the compiled model's output: logits = monitor.tap(model(x)).",
        )
    if is_torchscript(head.module):
        return (
            f"{head.name!r} is TorchScript, which calls no hook of a layer",
            "For rows, tap the model's output: logits = monitor.tap(model(x)).",
        )
    if probe.traced_backward:
        return (
            "the backward pass is compiled (compiled autograd), where a hook would break the graph",
            "For rows, compile the forward pass only.",
        )
    if probe.misshapen is not None:
        return (
            f"the output of {head.name!r} has shape {list(probe.misshapen)}, without its {head.classes} "
            f"classes along axis {'1' if head.spatial else '-1'}",
            f"Name the layer that returns the logits, or tap them: {tap[:-1]}, class_axis=1).",
        )
    if model is not None and not any(module is head.module for module in model.modules()):
        return (
            f"the head {head.name!r} was replaced after the monitor was attached",
            "Attach the monitor after the model has its final head.",
        )
    if probe.returned is not None:
        return (
            f"{head.name!r} returns a {probe.returned}, not one tensor of logits",
            f"Name the layer that returns the logits, or tap them: {tap}.",
        )
    if probe.not_in_output:
        return (
            f"the output of {type(head.module).__name__} holds no logits that {head.name!r} made",
            f"For rows, tap the logits where they are made: {tap}.",
        )
    if probe.fired:
        return (
            "the head fired, but no gradient came back to its output",
            f"If the loss is computed from other logits, pass those through {tap}.",
        )
    return _never_trained(probe, head)


def _never_trained(probe: HeadProbe, head: Head) -> tuple[str, str]:
    """Return cause and cure for a head that was never called where gradients are kept."""
    if probe.unreadable:
        return (
            "the head only gets tensors of vmap, of a nested layout or of a trace",
            "If a plain tensor holds the logits later, pass it through monitor.tap(logits).",
        )
    weight = head.weight
    used = weight is not None and weight.grad is not None
    fused = (
        "The loss must use the head's weight itself, as fused and chunked cross-entropies do. For rows, "
        f"{_TAP_FEATURES}, or switch the fused loss off, so that the model returns logits."
    )
    if probe.frozen:
        return (
            f"no gradient comes back to {head.describe()}: neither it nor its input needs one (a frozen "
            "teacher?)",
            f"Name the head that is trained: {call_with('head=...')}.",
        )
    if probe.in_evaluation:
        return "the head fired only in eval mode", "Call model.train() for training steps."
    if probe.fired_without_gradient:
        where = "in eval mode or without gradients (generation, evaluation)"
        return (
            f"in training the head was never called; it fired only {where}",
            fused if used or head.tied else "Gradients must be enabled at the head; or name the right head.",
        )
    if used:
        return (
            "the head never fired, although its weight gets a gradient (a fused loss that reads the weight, "
            "another module that computes the logits, or a model compiled before the monitor was attached)",
            f"For a fused loss, {_TAP_FEATURES}. Where logits are computed elsewhere, {_TAP}. Or attach "
            "before compiling.",
        )
    return (
        "the head never fired (a fused loss that reads its weight, another module that computes the logits, "
        "or a model compiled before the monitor was attached)",
        f"For a fused loss, {_TAP_FEATURES}. Where logits are computed elsewhere, {_TAP}. Or name the right "
        f"head ({call_with('head=...')}), or attach before compiling.",
    )
