"""Install the pair of hooks around ``optimizer.step()``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from nfi_monitor.capture.untraced import untraced


def has_closure(given: Sequence[Any]) -> bool:
    """Return whether there is a closure among the arguments of ``optimizer.step()``."""
    return any(callable(value) and not isinstance(value, Optimizer) for value in given)


class StepHooks:
    """Call ``before(arguments of the step)`` and ``after()`` around each ``optimizer.step()``.

    ``install`` registers the hooks.  Any error of both goes to ``failed("step", error)``, so that it cannot
    stop the training.  ``remove`` and ``serve`` may be called from inside them, for example by an
    ``on_alert`` that closes its monitor.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        before: Callable[[Sequence[Any]], None],
        after: Callable[[], None],
        failed: Callable[[str, BaseException], None],
    ) -> None:
        self._before, self._after, self._failed = before, after, failed
        self._optimizer: Optimizer | None = optimizer
        self._inside: int | None = None  # 0 or 1 while the first or second hook is running
        self._removed = False
        self._handles: list[Any] = []
        self._begun = False

    def install(self) -> None:
        """Register both hooks."""

        def around(which: int) -> Any:
            def hook(_optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                enabled = torch.is_grad_enabled()
                try:
                    try:
                        self._inside = which
                        if which == 0:
                            self._begun = True
                            self._before((*args, *kwargs.values()) if kwargs else args)
                        elif self._begun:
                            # A step that calls the step of its base class runs both hooks twice, nested:
                            # count one.
                            self._begun = False
                            self._after()
                    finally:
                        if self._removed:
                            self._leave_hook()
                except Exception as error:
                    self._failed("step", error)
                finally:
                    self._inside = None  # also if Ctrl-C interrupts _leave_hook
                    if torch.is_grad_enabled() is not enabled:  # Ctrl-C has interrupted torch.no_grad itself
                        torch.set_grad_enabled(enabled)

            return untraced(hook)

        optimizer, self._optimizer = self._optimizer, None
        if optimizer is not None:
            self._handles.append(optimizer.register_step_pre_hook(around(0)))
            self._handles.append(optimizer.register_step_post_hook(around(1)))

    def serve(
        self,
        before: Callable[[Sequence[Any]], None],
        after: Callable[[], None],
        failed: Callable[[str, BaseException], None],
    ) -> None:
        """Let the hooks call these functions from now on."""
        self._before, self._after, self._failed = before, after, failed

    def remove(self) -> None:
        self.serve(lambda given: None, lambda: None, lambda part, error: None)
        self._removed = True
        if self._inside is None:
            for handle in self._handles:
                handle.remove()  # a second time it does nothing

    def _leave_hook(self) -> None:
        """Remove the hooks at the end of one of them, if ``remove`` was called inside or before.

        torch iterates over its hooks, and raises an error if one is removed during that, unless it is the
        last.  So a hook that is not the last is removed when the other hook runs.  At worst one hook stays
        and does nothing.
        """
        inside, self._inside = self._inside, None
        if inside is None or len(self._handles) < 2:
            return
        hooks, own = self._handles[inside].hooks_dict_ref(), self._handles[inside].id
        if inside == 0 or (hooks and next(reversed(hooks)) == own):
            self._handles[1 - inside].remove()
        if hooks and own in hooks and next(reversed(hooks)) == own:
            self._handles[inside].remove()
