"""Heads of every kind: convolutions, bare parameters, several, frozen, wrapped, and what cannot be one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfi_monitor import HeadNotFoundError, Monitor
from nfi_monitor.caller import called_as
from nfi_monitor.capture.head import Head, find_head
from nfi_monitor.capture.head_probe import HeadProbe, Rows
from nfi_monitor.capture.sampling import row_stride
from tests.capture.test_head import Body
from tests.measure.measured import quantities


def rows_of_head(model: nn.Module, head: Any, *inputs: Tensor, loss: Any) -> tuple[Rows, Tensor, Head]:
    """Return the rows that the probe delivers for one backward pass, the model's output, and the head."""
    found = find_head(model, head)
    delivered: list[Rows] = []

    def failed(part: str, error: BaseException) -> None:
        raise error

    probe = HeadProbe(lambda: 1, delivered.append, failed, head=found)
    handle = found.module.register_forward_hook(probe, with_kwargs=True)
    output = model(*inputs)
    loss(output).backward()
    handle.remove()
    (rows,) = delivered
    assert probe.head is not None
    return rows, output, probe.head


# --- convolutions: the classes are axis 1 -----------------------------------------------------------

CONVOLUTIONS = {
    "Conv1d": (nn.Conv1d(4, 5, 1), (2, 4, 9)),
    "Conv2d": (nn.Conv2d(4, 5, 1), (2, 4, 6, 7)),
    "Conv2d 3x3": (nn.Conv2d(4, 5, 3, padding=1), (2, 4, 6, 7)),
    "Conv3d": (nn.Conv3d(4, 5, 1), (2, 4, 3, 3, 3)),
    "ConvTranspose2d": (nn.ConvTranspose2d(4, 5, 1), (2, 4, 6, 7)),
    "ConvTranspose2d 2x2": (nn.ConvTranspose2d(4, 5, 2, stride=2), (2, 4, 3, 4)),
    "one picture": (nn.Conv2d(4, 5, 1), (4, 6, 7)),
    "channels last": (nn.Conv2d(4, 5, 1).to(memory_format=torch.channels_last), (2, 4, 6, 7)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolutions_rows_are_those_of_its_pixels(kind: str) -> None:
    torch.manual_seed(0)
    layer, shape = CONVOLUTIONS[kind]
    x = torch.randn(shape)
    layer.zero_grad()
    y = torch.randint(0, 5, layer(x).movedim(-1 - find_head(layer, layer).spatial, -1).shape[:-1])
    y.view(-1)[::3] = -100
    axis = len(shape) - len(find_head(layer, layer).module.kernel_size) - 1

    def loss(z: Tensor) -> Tensor:
        return F.cross_entropy(z.movedim(axis, -1).reshape(-1, 5), y.view(-1), ignore_index=-100)

    rows, output, found = rows_of_head(layer, layer, x, loss=loss)
    flat = output.detach().movedim(axis, -1).reshape(-1, 5)
    (grad,) = torch.autograd.grad(
        F.cross_entropy(leaf := flat.clone().requires_grad_(), y.view(-1), ignore_index=-100), leaf
    )
    assert rows.total == len(flat)
    assert torch.equal(rows.logits, flat)
    torch.testing.assert_close(rows.grad, grad)
    found = quantities(rows.grad, rows.logits)
    assert found["zero_sum_violation_max"] < 1e-6
    assert found["ignored_fraction"] == pytest.approx(1 - (y != -100).float().mean().item())
    if set(layer.kernel_size) == {1}:
        assert torch.equal(rows.features, x.movedim(axis, -1).reshape(-1, 4))
        weight = find_head(layer, layer).classes_first(layer.weight.detach())
        torch.testing.assert_close(rows.features @ weight.T + layer.bias, flat)
    else:
        assert rows.features is None


def test_of_a_large_picture_a_stride_of_pixels_is_kept_without_its_storage() -> None:
    layer = nn.Conv2d(3, 19, 1)
    rows, output, _ = rows_of_head(layer, layer, torch.randn(2, 3, 300, 300), loss=lambda z: z.square().sum())
    stride = row_stride(rows.total, 19)
    assert rows.total == 2 * 300 * 300 and stride > 1
    assert rows.logits.untyped_storage().nbytes() == rows.logits.numel() * 4
    flat = output.detach().movedim(1, -1).reshape(-1, 19)
    first = int((flat[:stride] - rows.logits[0]).abs().sum(1).argmin())
    assert torch.equal(rows.logits, flat[first::stride])
    assert torch.equal(rows.grad, 2 * rows.logits)


def test_a_convolution_whose_output_is_pooled_is_read_after_the_pooling() -> None:
    model = Body(
        classifier=nn.Sequential(nn.Dropout(), nn.Conv2d(8, 5, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    )
    head = find_head(model)
    assert head.name == "classifier" and head.module is model.classifier
    assert head.class_axis_of(torch.empty(4, 5, 1, 1)) == -3
    assert head.class_axis_of(torch.empty(4, 5)) == -1
    assert head.class_axis_of(torch.empty(4, 8, 6, 6)) is None, "its classes are not there"


def test_a_container_whose_classes_are_elsewhere_is_said_and_not_read() -> None:
    class Flat(nn.Module):
        """Returns [N, H·W, K], although it ends in a convolution."""

        def __init__(self) -> None:
            super().__init__()
            self.final = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.final(x).flatten(2).mT.unsqueeze(1)

    model = nn.Sequential(Flat())
    optimizer = torch.optim.Adam(model.parameters())
    with Monitor(model, optimizer, head="0", console=False, every=1) as monitor:
        for _ in range(6):
            model(torch.randn(2, 3, 5, 5)).square().mean().backward()
            optimizer.step()
    (text,) = [note.message for note in monitor.notes if note.code == "head_never_fired"]
    assert "[2, 1, 25, 4]" in text and "4 classes along axis 1" in text
    assert len(monitor.history["zero_sum_violation"][1]) == 0


def test_tapped_logits_of_a_segmentation_are_read_along_axis_1() -> None:
    model, x, y = nn.Conv2d(3, 5, 1), torch.randn(2, 3, 4, 4), torch.randint(0, 5, (2, 8, 8))
    optimizer = torch.optim.Adam(model.parameters())
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(3):
            z = F.interpolate(model(x), scale_factor=2, mode="bilinear")
            loss = F.cross_entropy(monitor.tap(z, class_axis=1), y)
            loss.backward()
            monitor.observe_loss(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert monitor.history["head_loss"][1] == pytest.approx(monitor.history["loss"][1], rel=1e-6)


# --- bare parameters ----------------------------------------------------------------------------------


class Unembed(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.W_U = nn.Parameter(torch.randn(width, classes))

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.W_U


class Bare(nn.Module):
    """Logits made by a parameter, in one of the ways in which people write it."""

    def __init__(self, write: Any, classes_first: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.W_U = nn.Parameter(torch.randn(*((7, 4) if classes_first else (4, 7))))
        self.b_U = nn.Parameter(torch.randn(7))
        self.write = write

    def forward(self, tokens: Tensor) -> Any:
        return self.write(self, self.embed(tokens))


WRITTEN = {
    "matmul": (lambda m, h: h @ m.W_U, False),
    "bias": (lambda m, h: h @ m.W_U + m.b_U, False),
    "einsum": (lambda m, h: torch.einsum("btd,dv->btv", h, m.W_U), False),
    "linear": (lambda m, h: F.linear(h, m.W_U), True),
    "linear with bias": (lambda m, h: F.linear(h, m.W_U, m.b_U), True),
    "tuple": (lambda m, h: (h @ m.W_U, h), False),
    "dict": (lambda m, h: {"hidden": h, "logits": h @ m.W_U}, False),
    "embedding": (lambda m, h: F.linear(h, m.embed.weight), True),
}


def logits_in(output: Any) -> Tensor:
    output = output["logits"] if isinstance(output, dict) else output
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
def test_a_bare_parameters_logits_features_and_gradient_are_read(written: str, precision: Any) -> None:
    write, classes_first = WRITTEN[written]
    model = Bare(write, classes_first)
    head = "embed.weight" if written == "embedding" else "W_U"
    tokens, targets = torch.randint(0, 7, (3, 5)), torch.randint(0, 7, (15,))

    def loss(output: Any) -> Tensor:
        return F.cross_entropy(logits_in(output).float().view(-1, 7), targets)

    with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
        rows, output, found = rows_of_head(model, head, tokens, loss=loss)
    z = logits_in(output).detach().reshape(15, 7)
    (grad,) = torch.autograd.grad(F.cross_entropy(leaf := z.float().requires_grad_(), targets), leaf)
    assert torch.equal(rows.logits, z) and rows.total == 15
    torch.testing.assert_close(rows.grad, grad.to(rows.grad.dtype))
    features = model.embed.weight.detach()[tokens].reshape(15, 4)
    torch.testing.assert_close(rows.features, features.to(rows.features.dtype))
    assert found.outputs == 7 and found.classes_first(found.weight).shape == (7, 4)


def test_a_parameter_is_named_by_itself_by_its_name_or_by_its_module() -> None:
    model = Body(unembed=Unembed(8, 5))
    for head in (model.unembed.W_U, "unembed.W_U", "unembed", model.unembed):
        found = find_head(model, head)
        assert found.weight is model.unembed.W_U and found.outputs == 5 and found.module is model.unembed
    assert find_head(model, model.trunk[0].weight).module is model.trunk[0], "a layer's weight is the layer"


def test_packed_activations_are_not_unpacked_for_their_features() -> None:
    """Unpacking them would run the hooks: non-reentrant checkpointing would compute the model once more."""
    model, unpacked = Bare(WRITTEN["matmul"][0]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: unpacked.append(t) or t):
        found = find_head(model, "W_U")
        probe = HeadProbe(lambda: 1, lambda rows: None, lambda part, error: None, head=found)
        model.register_forward_hook(probe, with_kwargs=True)
        model(torch.randint(0, 7, (3, 5)))
    assert probe.fired == 1 and probe.without_features == 1 and unpacked == []


# --- which of several ---------------------------------------------------------------------------------


def test_of_heads_under_usual_names_the_auxiliary_one_is_not_taken() -> None:
    model = nn.ModuleDict(
        {
            "auxiliary_head": nn.ModuleDict({"classifier": nn.Conv2d(4, 5, 1)}),
            "decode_head": nn.ModuleDict({"classifier": nn.Conv2d(8, 5, 1)}),
        }
    )
    head = find_head(model)
    assert head.name == "decode_head.classifier"
    assert head.others == ("auxiliary_head.classifier (Conv2d 4→5)",)


def test_of_an_adaptive_softmax_the_first_layer_is_the_head_and_a_note_says_so() -> None:
    torch.manual_seed(0)
    body, adaptive = nn.Linear(6, 16), nn.AdaptiveLogSoftmaxWithLoss(16, 40, [10, 20])
    model = nn.Sequential(body, adaptive)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    entropies = []
    with Monitor(model, optimizer, console=False, every=1) as monitor:
        for _ in range(4):
            h, y = body(torch.randn(32, 6)).relu(), torch.randint(0, 40, (32,))
            first = torch.where(y < 10, y, torch.where(y < 20, 10, 11))
            entropies.append(F.cross_entropy(adaptive.head(h.detach()), first).item())
            loss = adaptive(h, y).loss
            loss.backward()
            monitor.observe_loss(loss)
            optimizer.step()
            optimizer.zero_grad()
    assert monitor.history["head_loss"][1] == pytest.approx(entropies, rel=1e-5)
    assert [note.code for note in monitor.notes] == ["adaptive_softmax"]


def test_classes_are_preferred_to_boxes() -> None:
    box = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model = Body(class_labels_classifier=nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), bbox_predictor=box)
    assert find_head(model).name == "class_labels_classifier.1"
    assert (
        find_head(Body(class_embed=nn.ModuleList([nn.Linear(8, 3)]), bbox_embed=box)).name == "class_embed.0"
    )
    assert find_head(Body(bbox_predictor=box)).name == "bbox_predictor.2", "it is the only one"


def test_a_frozen_teachers_head_is_not_taken() -> None:
    model = nn.ModuleDict({"student": Body(out=nn.Linear(8, 3)), "teacher": Body(out=nn.Linear(8, 3))})
    model["teacher"].requires_grad_(False)
    assert find_head(model).name == "student.out"
    everything = {id(p) for p in model.parameters()}
    assert find_head(model, trained=everything).name == "student.out", "the optimizer leaves it as it is"
    model["teacher"].requires_grad_(True)
    trained = {id(p) for p in model["student"].parameters()}
    assert find_head(model, trained=trained).name == "student.out"


def test_a_frozen_head_on_a_trained_body_is_still_the_head() -> None:
    model = Body(body=nn.Linear(8, 64), out=nn.Sequential(nn.Linear(8, 3)))
    model.out.requires_grad_(False)
    assert find_head(model).name == "out.0"


class ModulesToSaveWrapper(nn.Module):
    """As in peft: the active copy is called instead of the original."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.original_module = layer
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(layer), "other": copy.deepcopy(layer)})
        self.active_adapters = ["default"]


def test_the_copy_of_a_whole_classifier_that_an_adapter_trains_holds_the_head() -> None:
    model = Body(classifier=ModulesToSaveWrapper(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))))
    assert find_head(model).name == "classifier.modules_to_save.default.1"
    assert find_head(model, "classifier").name == "classifier.modules_to_save.default.1"


def test_the_copy_that_an_adapter_trains_is_the_head() -> None:
    model = Body(lm_head=ModulesToSaveWrapper(nn.Linear(8, 3)))
    head = find_head(model)
    assert head.module is model.lm_head.modules_to_save["default"] and head.weight is not None
    assert find_head(model, "lm_head").module is head.module


# --- what cannot be a head ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "says"),
    [
        ("rnn", "returns a tuple"),
        ("list", "never called"),
        ("softmax", "probabilities"),
        ("norm", "makes no logits"),
        ("norm.weight", "a matrix"),
        ([], "empty list"),
        (["out", "nothing"], "has no module named 'nothing'"),
        (nn.Parameter(torch.ones(2, 2)), "does not contain the Parameter"),
    ],
)
def test_what_cannot_be_a_head_is_refused_with_what_can(head: Any, says: str) -> None:
    model = Body(
        rnn=nn.GRU(8, 8), list=nn.ModuleList([nn.Linear(8, 2)]), softmax=nn.Softmax(-1), norm=nn.LayerNorm(8),
        out=nn.Linear(8, 3),
    )  # fmt: skip
    with pytest.raises(HeadNotFoundError, match=says):
        Monitor(model, torch.optim.Adam(model.parameters()), head=head, console=False)


def test_a_message_names_only_layers_that_the_model_has_and_the_users_own_call() -> None:
    with called_as("NFICallback({})"), pytest.raises(HeadNotFoundError) as raised:
        find_head(Body(out=nn.Linear(8, 3)), "lm_head")
    assert "NFICallback(head='out')" in str(raised.value)
    with pytest.raises(HeadNotFoundError) as raised:
        find_head(nn.Sequential(nn.Flatten()))
    assert "head='" not in str(raised.value) and "head=..." in str(raised.value)


def test_a_number_is_no_head() -> None:
    model = nn.Linear(4, 3)
    with pytest.raises(TypeError, match=r"pass a module, a parameter, the qualified name"):
        Monitor(model, torch.optim.Adam(model.parameters()), head=3)  # type: ignore[arg-type]


# --- why no rows come ---------------------------------------------------------------------------------


def no_rows(model: nn.Module, step: Any, **options: Any) -> str:
    """Train six steps with ``step(model)`` as the loss; return the note that says why no rows came."""
    optimizer = torch.optim.Adam(model.parameters())
    with Monitor(model, optimizer, console=False, every=1, **options) as monitor:
        for _ in range(6):
            step(model).backward()
            optimizer.step()
    return next(note.message for note in monitor.notes if note.code in ("head_never_fired", "head_replaced"))


def test_a_head_that_only_generation_calls_is_not_blamed_on_eval_mode() -> None:
    def step(model: nn.Module) -> Tensor:
        h = model.trunk(torch.randn(3, 4))
        with torch.no_grad():
            model.eval().lm_head(h)
        model.train()
        return F.linear(h, model.lm_head.weight).logsumexp(-1).mean()

    text = no_rows(Body(lm_head=nn.Linear(8, 3)), step)
    assert "in training the head was never called" in text and "fused" in text
    assert "model.train()" not in text


def test_a_head_that_was_replaced_after_the_monitor_was_attached_is_said() -> None:
    def step(model: nn.Module) -> Tensor:
        if not hasattr(model.lm_head, "new"):
            model.lm_head = nn.Linear(8, 3)
            model.lm_head.new = True
        return model.lm_head(model.trunk(torch.randn(3, 4))).logsumexp(-1).mean()

    text = no_rows(Body(lm_head=nn.Linear(8, 3)), step)
    assert "replaced after the monitor was attached" in text and "attach a new one" in text


def test_a_named_module_that_returns_a_tuple_is_said() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(8, 3)

        def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
            return self.out(h), h

    def step(model: nn.Module) -> Tensor:
        return model.two(model.trunk(torch.randn(3, 4)))[0].logsumexp(-1).mean()  # type: ignore[no-any-return]

    assert "'two' returns a tuple" in no_rows(Body(two=Two()), step, head="two")
