"""Run many calls on processes, or on a Ray cluster, with joblib; yield results as they arrive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


class BackendError(RuntimeError):
    """Report a backend whose package is not installed, and what to install."""


def as_completed(calls: Iterable[Any], *, jobs: int, backend: str = "loky") -> Iterator[Any]:
    """Yield results of joblib's ``delayed(function)(...)`` objects, in any order.

    ``backend="ray"`` uses the cluster that ``RAY_ADDRESS`` names, or this machine. Its results all come at
    the end, because Ray's joblib backend cannot return them one by one.
    """
    try:
        from joblib import Parallel, parallel_config
    except ImportError as error:
        raise BackendError('This needs joblib: pip install "nfi-monitor[examples]"') from error
    if backend == "ray":
        try:
            from ray.util.joblib import register_ray
        except ImportError as error:
            raise BackendError('backend "ray" needs Ray: pip install "ray[default]"') from error
        register_ray()
    with parallel_config(backend=backend, n_jobs=jobs):
        yield from Parallel(return_as="list" if backend == "ray" else "generator_unordered")(calls)
