"""Many calls over processes, or over a Ray cluster, with joblib: results in the order in which they come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


class BackendError(RuntimeError):
    """A backend whose package is not installed; says what to install."""


def as_completed(calls: Iterable[Any], *, jobs: int, backend: str = "loky") -> Iterator[Any]:
    """Results of joblib's ``delayed(function)(...)`` objects, in any order.

    ``backend="ray"``: on the cluster that ``RAY_ADDRESS`` names, or on this machine; its results come all at
    the end, because Ray's joblib backend cannot hand them over one by one.
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
