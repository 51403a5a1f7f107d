"""Serve the NFI tab: a few JSON routes over :mod:`.runs`, and the files of ``static/``.

It imports only tensorboard and the standard library, and does no work at import or construction: an error
there would stop TensorBoard for everyone in the environment.  An error in a request is answered as JSON that
says what happened; the tab shows it and tries again.
"""

from __future__ import annotations

import gzip
import json
import math
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from tensorboard import plugin_util
from tensorboard.plugins import base_plugin

from .runs import PLUGIN, Run, Runs

_STATIC = Path(__file__).parent / "static"
_TYPES = {".js": "text/javascript", ".css": "text/css"}
_POINTS = (50, 600, 4000)  # smallest, default and largest number of buckets of a request
_ALERTS = 5_000  # the last alerts are listed: a browser cannot show 100,000
# The keys that the list of alerts shows or searches; a click on an alert requests the others.
_ROW = (
    "id", "what", "kind", "severity", "state", "phase", "first_step", "last_step", "headline", "mechanism",
    "forecast", "layer",
)  # fmt: skip

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
Query = Mapping[str, str]


class NFIPlugin(base_plugin.TBPlugin):
    """Serve ``runs``, ``run?run=``, ``alert?run=&id=&first=``, ``series?run=&from=&to=&points=&names=``."""

    plugin_name = PLUGIN

    def __init__(self, context: Any) -> None:
        self._runs = Runs(context.data_provider)

    def get_plugin_apps(self) -> dict[str, Application]:
        routes: dict[str, Application] = {
            f"/{name}": _json_app(handler)
            for name, handler in (
                ("runs", self._serve_runs),
                ("run", self._serve_run),
                ("alert", self._serve_alert),
                ("series", self._serve_series),
            )
        }
        # Only files that are listed here have a route: no request can reach another file.
        files = [path for path in _STATIC.iterdir() if path.suffix in _TYPES] if _STATIC.is_dir() else []
        return routes | {f"/{path.name}": _file_app(path) for path in files}

    def is_active(self) -> bool:
        return False  # TensorBoard has asked its data provider before: without data there is no tab

    def frontend_metadata(self) -> Any:
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="NFI", disable_reload=True)

    def _find(self, environ: dict[str, Any], query: Query) -> Run:
        runs = self._refresh(environ)
        name = query.get("run", "")
        if name not in runs:
            shown = name if len(name) <= 80 else name[:80] + "…"
            raise _NotFound(f"There is no run {shown!r} any more. Choose another one.")
        return runs[name]

    def _refresh(self, environ: dict[str, Any]) -> dict[str, Run]:
        return self._runs.refresh(plugin_util.context(environ), plugin_util.experiment_id(environ))

    def _serve_runs(self, environ: dict[str, Any], query: Query) -> Any:
        runs = self._refresh(environ)
        return {"runs": [{"name": name, "version": run.version} for name, run in sorted(runs.items())]}

    def _serve_run(self, environ: dict[str, Any], query: Query) -> Any:
        run = self._find(environ, query)
        with run.lock:
            if query.get("version") == run.version:
                # Nothing new: answer a poll with a few bytes.
                return {"version": run.version, "unchanged": True, "seconds_ago": _ago(run)}
            chunks, alerts = run.chunks, run.alerts[-_ALERTS:]
            left = len(run.alerts) - len(alerts)
            more = [f"{left:,} earlier alerts are not listed here: alerts.jsonl has all."] if left else []
            return {
                "name": run.name,
                "version": run.version,
                "seconds_ago": _ago(run),
                "record": run.record,
                "phases": run.phases(),
                "alerts": [{key: alert.get(key) for key in _ROW} for alert in alerts],
                "extent": [int(chunks[0].first), int(chunks[-1].last)] if chunks else None,
                "readings": sum(len(chunk.array) for chunk in chunks),
                "problems": [*run.problems, *more],
            }

    def _serve_alert(self, environ: dict[str, Any], query: Query) -> Any:
        run = self._find(environ, query)
        first = int(_number(query, "first", 0))
        with run.lock:
            alerts = run.alerts
        for alert in alerts:
            if alert.get("id") == query.get("id") and alert["first_step"] == first:
                return alert
        raise _NotFound("This alert is not in the run any more: the run was resumed from before it.")

    def _serve_series(self, environ: dict[str, Any], query: Query) -> Any:
        run = self._find(environ, query)
        fewest, default, most = _POINTS
        points = int(min(max(_number(query, "points", default), fewest), most))
        low, high = _number(query, "from", float("-inf")), _number(query, "to", float("inf"))
        with run.lock:
            names = query["names"].split(",") if query.get("names") else run.key_quantities()
            return {"version": run.version, **run.series(low, high, points, names)}


class _NotFound(LookupError):
    pass


def _ago(run: Run) -> float:
    """Return the seconds since the run last wrote; the clocks of the two machines may differ."""
    return round(max(0.0, time.time() - run.wall_time), 1)


def _number(query: Query, name: str, default: float) -> float:
    text = query.get(name)
    if text is None:
        return default
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not math.isfinite(number):
        raise ValueError(f"{name}={text[:40]!r} is no number.")
    return number


def _json_app(handler: Callable[[dict[str, Any], Query], Any]) -> Application:
    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        status = "200 OK"
        try:
            pairs = parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
            answer = handler(environ, {key: values[-1] for key, values in pairs.items()})
        except _NotFound as error:
            status, answer = "404 Not Found", {"error": str(error)}
        except ValueError as error:
            status, answer = "400 Bad Request", {"error": str(error)}
        except Exception as error:
            traceback.print_exc()  # to TensorBoard's own terminal, for a bug report
            status = "500 Internal Server Error"
            answer = {"error": f"The NFI tab failed on the server: {type(error).__name__}: {error}"}
        body = json.dumps(answer, separators=(",", ":"), allow_nan=False).encode()
        return _respond(environ, start_response, status, "application/json", body, "no-store")

    return application


def _file_app(path: Path) -> Application:
    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        kind = f"{_TYPES[path.suffix]}; charset=utf-8"
        # no-cache: after an upgrade, the browser must not use the old version's scripts.
        return _respond(environ, start_response, "200 OK", kind, path.read_bytes(), "no-cache")

    return application


def _respond(
    environ: Mapping[str, Any],
    start_response: Callable[..., Any],
    status: str,
    content_type: str,
    body: bytes,
    cache: str,
) -> Iterable[bytes]:
    headers = [
        ("Content-Type", content_type),
        ("X-Content-Type-Options", "nosniff"),
        ("Cache-Control", cache),
    ]
    if len(body) > 1000 and "gzip" in environ.get("HTTP_ACCEPT_ENCODING", ""):
        body = gzip.compress(body, compresslevel=3, mtime=0)
        headers += [("Content-Encoding", "gzip"), ("Vary", "Accept-Encoding")]
    start_response(status, [*headers, ("Content-Length", str(len(body)))])
    return [body]
