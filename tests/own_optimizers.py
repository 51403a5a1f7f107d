"""Small optimizers that keep their state as those of other packages do, for tests of how it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Own(torch.optim.Optimizer):
    """Adam without a first moment, whose step is not torch's: its state must be checked before it is read."""

    name = "exp_avg_sq"

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: Any = (0.9, 0.99), **more: Any
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0, **more})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.update(param, param.grad, self.state[param], group)
        return loss

    def update(self, param: Tensor, grad: Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        step = state["step"] = state.get("step", 0) + 1
        moment = state.setdefault(self.name, torch.zeros_like(param))
        beta2 = group["betas"][1]
        moment.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        self.move(param, grad, moment / (1 - beta2**step), group)

    def move(self, param: Tensor, grad: Tensor, square: Tensor, group: dict[str, Any]) -> None:
        param.addcdiv_(grad, square.sqrt().add_(group["eps"]), value=-group["lr"])


class Amsgrad(Own):
    def update(self, param: Tensor, grad: Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        super().update(param, grad, state, group)
        most = state.setdefault("max_exp_avg_sq", torch.zeros_like(param))
        torch.maximum(most, state["exp_avg_sq"], out=most)


class Coupled(Own):
    """L2 regularization: the weights are added to the gradient before it is squared."""

    def update(self, param: Tensor, grad: Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        super().update(param, grad + group["weight_decay"] * param, state, group)


class Uncounted(Own):
    """Keeps its step counts where nobody finds them."""

    def update(self, param: Tensor, grad: Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        counts = self.__dict__.setdefault("counts", {})
        state["step"] = counts.get(param, 0)
        super().update(param, grad, state, group)
        counts[param] = state.pop("step")


class Nested(Own):
    """heavyball: the state in one more mapping, other names, and a moment that needs no correction."""

    def update(self, param: Tensor, grad: Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        own = state.setdefault(0, {})
        step = own["step"] = own.get("step", 0) + 1
        moment = own.setdefault("update_by_adam_exp_avg_sq_0", torch.zeros_like(param))
        beta2 = group["betas"][1]
        moment.lerp_(grad * grad, (1 - beta2) / (1 - beta2**step))
        self.move(param, grad, moment, group)


class FromFirst(Own):
    """ADOPT: the moment begins at the first squared gradient."""

    def update(self, param: Tensor, grad: Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        step = state["step"] = state.get("step", 0) + 1
        moment = state.setdefault("exp_avg_sq", torch.zeros_like(param))
        beta2 = group["betas"][1] if step > 1 else 0.0
        moment.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        self.move(param, grad, moment, group)


class Scaled(Own):
    """Prodigy: an average of d²·g², with a d that grows."""

    def update(self, param: Tensor, grad: Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        scale = 1e-6 * 1.3 ** state.get("step", 0)
        super().update(param, scale * grad, state, group)


class Rotated(Own):
    """SOAP, GaLore of full rank: matrices have their moment in another basis, vectors in their own."""

    def update(self, param: Tensor, grad: Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        if grad.ndim > 1:
            basis = torch.linalg.qr(torch.arange(1.0, 1 + grad.shape[0] ** 2).reshape(len(grad), -1).sin())[0]
            grad = basis @ grad
        super().update(param, grad, state, group)


class PerTensor(Own):
    """NovoGrad, Amos: one number for each tensor."""

    def update(self, param: Tensor, grad: Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        moment = state.setdefault("exp_avg_sq", torch.zeros(()))
        moment.mul_(0.98).add_(grad.square().sum(), alpha=0.02)
        self.move(param, grad, moment, group)


class Seeded(Own):
    """APOLLO: there is a state before the first step."""

    def __init__(self, params: Iterable[Any], **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            for seed, param in enumerate(group["params"]):
                self.state[param]["seed"] = seed


class LowRank(Own):
    """GaLore, APOLLO: matrices have a moment of fewer rows."""

    def update(self, param: Tensor, grad: Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        if grad.ndim < 2:
            super().update(param, grad, state, group)
        else:
            moment = state.setdefault("exp_avg_sq", torch.zeros_like(grad[:2]))
            moment.mul_(0.99).addcmul_(grad[:2], grad[:2], value=0.01)
            param.add_(grad, alpha=-group["lr"])


class Adan(Own):
    """Three betas; the last averages the square of a gradient with its difference."""

    def update(self, param: Tensor, grad: Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        before = state.get("previous_grad", grad)
        state.setdefault("exp_avg_diff", torch.zeros_like(param))
        state["previous_grad"] = grad.clone()
        moment = state.setdefault("exp_avg_sq", torch.zeros_like(param))
        mixed = grad + (1 - group["betas"][1]) * (grad - before)
        moment.mul_(group["betas"][2]).addcmul_(mixed, mixed, value=1 - group["betas"][2])
        self.move(param, grad, moment, group)


class Adafactor(Own):
    """The decay grows with the step, and there are no betas."""

    def update(self, param: Tensor, grad: Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        step = state["step"] = state.get("step", 0) + 1
        moment = state.setdefault("exp_avg_sq", torch.zeros_like(param))
        moment.lerp_(grad * grad, step**-0.8)
        self.move(param, grad, moment, group)


class Warming(Own):
    """Is Adam for some steps, and keeps another average later."""

    def update(self, param: Tensor, grad: Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        super().update(param, grad if state.get("step", 0) < 10 else 100 * grad, state, group)


class InPlace(Own):
    """schedule-free: makes its update in the gradient's memory."""

    def move(self, param: Tensor, grad: Tensor, square: Tensor, group: dict[str, Any]) -> None:
        param.add_(grad.div_(square.sqrt().add_(group["eps"])).add_(param), alpha=-group["lr"])


class Shared(Own):
    """MADGRAD: one number for all parameters in the state."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        count = self.state.setdefault("k", torch.zeros(1, dtype=torch.long))  # type: ignore[arg-type,call-overload]
        count += 1
        return super().step(closure)


class Momentum(Own):
    """Lion, PNM: betas, and no second moment."""

    def update(self, param: Tensor, grad: Tensor, state: dict[Any, Any], group: dict[str, Any]) -> None:
        average = state.setdefault("pos_momentum", torch.zeros_like(param))
        average.lerp_(grad, 0.1)
        param.add_(average.sign(), alpha=-group["lr"])
