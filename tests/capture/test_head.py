from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nfi_monitor import HeadNotFoundError
from nfi_monitor.capture.head import find_head
from nfi_monitor.capture.head_probe import HeadProbe, Rows


class Body(nn.Module):
    """A trunk with linear layers of its own, and the given modules as attributes."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
        for name, part in parts.items():
            setattr(self, name, part)


class WithOutputEmbeddings(Body):
    """Like a transformers model: knows its own head; a decoder comes after it in registration order."""

    def get_output_embeddings(self) -> nn.Module | None:
        return self.out  # type: ignore[return-value]


def test_the_models_own_answer_comes_first() -> None:
    model = WithOutputEmbeddings(out=nn.Linear(8, 50), later=nn.Linear(8, 3))
    assert find_head(model).name == "out"


def test_no_answer_falls_back_to_the_usual_names() -> None:
    class Silent(WithOutputEmbeddings):
        def get_output_embeddings(self) -> None:
            return None

    model = Silent(score=nn.Linear(8, 3), out=nn.Identity(), extra=nn.Linear(3, 3))
    assert find_head(model).name == "score"


@pytest.mark.parametrize("name", ["lm_head", "score", "classifier", "classification_head", "head", "fc"])
def test_a_head_under_a_usual_name_is_found_before_what_is_registered_after_it(name: str) -> None:
    model = Body(**{name: nn.Linear(8, 3)}, projector=nn.Linear(8, 8))
    assert find_head(model).name == name


def test_of_a_classifier_that_is_a_sequence_the_last_linear_is_the_head() -> None:
    model = Body(classifier=nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)))
    assert find_head(model).name == "classifier.3"


def test_an_attentions_own_out_proj_is_not_taken_for_a_head() -> None:
    """MultiheadAttention.out_proj is never called as a module: its hook would never fire."""
    model = Body(attention=nn.MultiheadAttention(8, 2), last=nn.Linear(8, 3))
    assert find_head(model).name == "last"


def test_a_plain_sequence_ends_in_its_head() -> None:
    assert find_head(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))).name == "2"


def test_a_blocks_fc_is_not_taken_for_the_models() -> None:
    model = Body(block=Body(fc=nn.Linear(8, 8)), last=nn.Linear(8, 3))
    assert find_head(model).name == "last"
    assert find_head(nn.DataParallel(Body(fc=nn.Linear(8, 3), other=nn.Linear(8, 8)))).name == "fc"


def test_the_names_of_wrappers_are_left_out() -> None:
    model = torch.compile(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), backend="eager")
    assert find_head(model).name == "1"
    assert find_head(model, "1").module is find_head(model).module


def test_a_tied_head_is_recognised() -> None:
    model = Body(embed=nn.Embedding(5, 8), lm_head=nn.Linear(8, 5, bias=False))
    assert not find_head(model).tied
    model.lm_head.weight = model.embed.weight
    assert find_head(model).tied


def test_a_transposed_head_is_read_classes_first() -> None:
    class Conv1D(nn.Module):  # as in GPT-2: weight [d, K]
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))

    head = find_head(Body(lm_head=Conv1D()))
    assert head.outputs == 3
    assert head.classes_first(head.weight.detach())[2].tolist() == [2.0, 5.0]


@pytest.mark.parametrize("head", ["nothing", "", nn.Linear(2, 2)])
def test_a_head_that_is_not_in_the_model_is_answered_with_what_is(head: Any) -> None:
    with pytest.raises(HeadNotFoundError, match=r"trunk\.2[\s\S]*head='lm_head'"):
        find_head(Body(lm_head=nn.Linear(8, 3)), head)


def probe() -> tuple[HeadProbe, list[Rows]]:
    delivered: list[Rows] = []

    def failed(part: str, error: BaseException) -> None:
        raise error

    return HeadProbe(lambda: 1, delivered.append, failed), delivered


def fire(module: nn.Module, hook: HeadProbe, inputs: Tensor) -> Tensor:
    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        return module(inputs)  # type: ignore[no-any-return]
    finally:
        handle.remove()


def test_what_is_delivered_is_the_true_gradient_detached_and_flattened_to_rows() -> None:
    head = nn.Linear(4, 3)
    hook, delivered = probe()
    inputs = torch.randn(2, 5, 4)
    weights = torch.randn(2, 5, 3)
    (fire(head, hook, inputs) * weights).sum().backward()
    (rows,) = delivered
    assert torch.equal(rows.grad, weights.reshape(10, 3))
    assert torch.equal(rows.features, inputs.reshape(10, 4))
    assert torch.equal(rows.logits, head(inputs).reshape(10, 3))
    assert not rows.logits.requires_grad and rows.total == 10


def test_under_autocast_rows_keep_the_runs_own_precision() -> None:
    head = nn.Linear(4, 3)
    hook, delivered = probe()
    with torch.autocast("cpu", torch.bfloat16):
        loss = fire(head, hook, torch.randn(6, 4)).float().logsumexp(-1).sum()
    loss.backward()
    assert delivered[0].grad.dtype is delivered[0].logits.dtype is torch.bfloat16


def test_of_a_huge_batch_a_stride_of_rows_is_kept_without_its_storage() -> None:
    head = nn.Linear(2, 4096)
    hook, delivered = probe()
    fire(head, hook, torch.randn(640, 2)).sum().backward()
    rows = delivered[0]
    assert rows.total == 640 and len(rows.grad) == len(rows.logits) == 64
    assert rows.logits.untyped_storage().nbytes() == rows.logits.numel() * 4


def test_without_gradients_or_in_eval_mode_nothing_is_delivered() -> None:
    head = nn.Linear(4, 3)
    hook, delivered = probe()
    with torch.no_grad():
        fire(head, hook, torch.randn(2, 4))
    head.eval()
    fire(head, hook, torch.randn(2, 4)).sum().backward()
    assert delivered == [] and hook.fired_without_gradient == 2


def test_a_recomputed_forward_is_delivered_once() -> None:
    from torch.utils.checkpoint import checkpoint

    for reentrant in (True, False):
        head = nn.Linear(4, 3)
        hook, delivered = probe()
        head.register_forward_hook(hook, with_kwargs=True)
        checkpoint(head, torch.randn(2, 4, requires_grad=True), use_reentrant=reentrant).sum().backward()
        assert len(delivered) == 1, reentrant


def test_features_given_by_keyword_are_seen() -> None:
    head = nn.Linear(4, 3)
    hook, delivered = probe()
    head.register_forward_hook(hook, with_kwargs=True)
    inputs = torch.randn(5, 4)
    head(input=inputs).sum().backward()
    assert torch.equal(delivered[0].features, inputs)


def test_a_loss_that_writes_its_gradient_over_the_logits_leaves_the_rows_as_they_were() -> None:
    class InPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, logits: Tensor) -> Tensor:
            ctx.save_for_backward(logits)
            return logits.logsumexp(-1).sum()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (logits,) = ctx.saved_tensors
            return logits.copy_(logits.softmax(-1))

    head = nn.Linear(4, 3)
    hook, delivered = probe()
    logits = fire(head, hook, torch.randn(6, 4))
    expected = logits.detach().clone()
    InPlace.apply(logits).backward()
    assert torch.equal(delivered[0].logits, expected)


def test_rows_let_go_of_their_tensors_once_delivered() -> None:
    import gc
    import weakref

    head = nn.Linear(4, 3)
    hook, delivered = probe()
    loss = fire(head, hook, torch.randn(6, 4)).sum()
    loss.backward()
    kept = weakref.ref(delivered.pop().logits)
    gc.collect()
    assert kept() is None, "loss is still alive, and must not keep the rows alive"


def test_vmap_and_functional_gradients_are_left_alone() -> None:
    head = nn.Linear(4, 3)
    hook, delivered = probe()
    head.register_forward_hook(hook, with_kwargs=True)
    torch.func.vmap(torch.func.grad(lambda x: head(x).sum()))(torch.randn(5, 4))
    head(torch.randn(2, 4)).sum().backward()
    assert len(delivered) == 1 and delivered[0].total == 2


def test_an_adapted_head_is_watched_as_a_whole() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer, self.down, self.up = nn.Linear(8, 3), nn.Linear(8, 2), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.up(self.down(x))

    assert find_head(Body(lm_head=Adapted())).name == "lm_head"
    assert find_head(Body(last=Adapted())).name == "last"


def test_a_convolution_after_the_last_linear_layer_is_the_head() -> None:
    assert find_head(Body(final=nn.Conv2d(8, 3, 1))).name == "final"
