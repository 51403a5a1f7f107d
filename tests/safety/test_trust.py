"""What the monitor may not do to its users: reach out, run what it reads, write where it should not."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from nfi_monitor import Monitor, cli
from nfi_monitor.replay.snapshots import Snapshot
from nfi_monitor.report.console import ConsoleSink
from nfi_monitor.report.explain.compose import explain_run
from nfi_monitor.report.json_values import json_line
from nfi_monitor.report.run_directory.reader import read_run
from nfi_monitor.report.run_directory.writer import RunDirectory
from nfi_monitor.report.summary import summarize
from nfi_monitor.report.terminal import escape_controls
from nfi_monitor.types import Alert, Change, Evidence, Note
from tests.report.builders import AT_RISK, INFO, SLINGSHOT, readings
from tests.runs import batch
from tests.safety import lock as lock_file
from tests.safety.killed import Child
from tests.safety.table import ROOT, Shown

SOURCES = sorted(
    path for top in ("nfi_monitor", "integrations", "examples") for path in (ROOT / top).rglob("*.py")
)


# --- what the source may say -------------------------------------------------------------------------

PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "copyreg"}
NETWORKS = {
    "socket", "socketserver", "ssl", "http", "urllib", "urllib3", "requests", "httpx", "aiohttp", "ftplib",
    "smtplib", "xmlrpc", "asyncio", "paramiko",
}  # fmt: skip
HARMLESS = {
    ("capture/model_hooks.py", "copyreg"): {
        "dispatch_table"
    },  # how models are pickled, not how they are read
    ("replay/snapshots.py", "pickle"): {"UnpicklingError"},  # what torch.load raises
    ("run_directory/lock.py", "socket"): {"gethostname"},
    ("tensorboard/plugin.py", "urllib"): {"parse_qs"},
    ("reference/parallel.py", "joblib"): {"Parallel", "parallel_config"},  # processes, and no joblib.load
    ("reference/study.py", "joblib"): {"delayed"},
}
"""Where a module of these is imported all the same, and the only names of it that may be used."""


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def found_in(path: Path, source: str) -> Iterator[str]:
    """What a source file does that it must not, each a sentence with its line."""
    tree = ast.parse(source)
    allowed = {module: names for (end, module), names in HARMLESS.items() if path.as_posix().endswith(end)}
    for node in ast.walk(tree):
        modules: list[tuple[str, set[str]]] = []
        if isinstance(node, ast.Import):
            modules = [(alias.name.partition(".")[0], set()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules = [(node.module.partition(".")[0], {alias.name for alias in node.names})]
        for module, names in modules:
            if module in PICKLES | NETWORKS and not (module in allowed and names <= allowed[module]):
                yield f"{path.name}:{node.lineno}: imports {module}"
        owner = node.value.id if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else ""
        if owner in allowed and node.attr not in allowed[owner]:  # type: ignore[attr-defined]
            yield f"{path.name}:{node.lineno}: uses {owner}.{node.attr}"  # type: ignore[attr-defined]
        if not isinstance(node, ast.Call):
            continue
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        name = called(node)
        if name == "torch.load" and options.get("weights_only") not in ("True", "not trusted"):
            yield f"{path.name}:{node.lineno}: torch.load without weights_only=True"
        if options.get("allow_pickle", "False") != "False":
            yield f"{path.name}:{node.lineno}: {name} with allow_pickle"
        if name in ("eval", "exec", "os.system", "os.popen", "__import__") or options.get("shell") == "True":
            yield f"{path.name}:{node.lineno}: calls {name}"
        if name.endswith((".read_pickle", ".hub.load", ".load_state_dict_from_url", "yaml.load")):
            yield f"{path.name}:{node.lineno}: calls {name}"


def test_nothing_in_the_package_unpickles_runs_or_connects() -> None:
    assert len(SOURCES) > 80
    assert [said for path in SOURCES for said in found_in(path, path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import socket",
        "from urllib.request import urlopen",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_the_look_at_the_source_sees(source: str) -> None:
    assert len(list(found_in(Path("module.py"), source))) == 1


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_snapshot_file_that_would_run_code_is_refused_unless_trusted(tmp_path: Path) -> None:
    file, made = tmp_path / "snapshot.pt", tmp_path / "made"
    torch.save({"format": 1, "step": 1, "extras": Evil(made)}, file)
    with pytest.raises(ValueError, match="more than tensors"):
        Snapshot.load(file)
    assert not made.exists(), "nothing was run"
    with pytest.raises((ValueError, KeyError, TypeError)):
        Snapshot.load(file, trusted=True)
    assert made.exists(), "the file would have run code"


# --- what a run does ---------------------------------------------------------------------------------


def hostile_model() -> tuple[nn.Module, str]:
    """Its head's name is a path out of the run directory, an escape sequence and markup."""
    model = nn.Module()
    name = "../../../escaped\x1b[2J[red]\n" + "nfi  step 1  CRITICAL"
    model._modules[name] = nn.Linear(12, 7)
    model.forward = lambda x: model._modules[name](x)  # type: ignore[assignment, method-assign]
    return model, name


def a_whole_life(run: Path) -> None:
    """A training under every sink, then all that a shell can ask of it."""
    model, name = hostile_model()
    with torch.no_grad():
        model._modules[name].weight.mul_(400)  # type: ignore[union-attr, operator]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    inputs, targets = batch()
    console = Console(file=io.StringIO())
    with Monitor(model, optimizer, run_dir=run, console=console, head=name, every=1) as monitor:
        for step in range(30):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            monitor.observe_loss(loss if step < 27 else float("nan"))
            loss.backward()
            optimizer.step()
    failed = [note.message for note in monitor.notes if note.code.startswith("failed")]
    if failed or not monitor.alerts:
        raise AssertionError(failed or "no alert: nothing to be written")
    sys.stdout = sys.stderr = io.StringIO()
    assert cli.main(["report", str(run)]) == 0
    assert cli.main(["report", str(run), "--json"]) == 0
    assert cli.main(["tail", str(run)]) == 0


def in_a_child(tmp_path: Path, watch: Callable[[str, tuple[Any, ...]], str]) -> str:
    """A whole life in a forked child under an audit hook; what ``watch(event, arguments)`` objects to."""
    a_whole_life(tmp_path / "warm")  # what is imported and cached on the first time is not looked at

    def work(said: Callable[[int], None]) -> None:
        objections: list[str] = []

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if objection := watch(event, arguments):
                objections.append(objection)

        sys.addaudithook(hook)
        sys.dont_write_bytecode = True
        a_whole_life(tmp_path / "run")
        said(1)
        assert not objections, sorted(set(objections))

    child = Child(work)
    said = child.wait()
    assert said or child.done == 1
    return said


def connects(event: str, arguments: tuple[Any, ...]) -> str:
    if (
        event.startswith(("socket.", "urllib.", "http.", "ftplib.", "smtplib."))
        and event != "socket.gethostname"
    ):
        return f"{event} {arguments[1:]}"
    return ""


def test_a_run_its_report_and_its_tail_connect_to_nothing(tmp_path: Path) -> None:
    assert in_a_child(tmp_path, connects) == ""
    assert connects("socket.connect", (None, ("127.0.0.1", 1))) and not connects("socket.gethostname", ())


def test_a_run_with_a_hostile_name_writes_into_its_run_directory_alone(tmp_path: Path) -> None:
    inside = os.path.realpath(tmp_path / "run")

    def writes(event: str, arguments: tuple[Any, ...]) -> str:
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return ""
            paths = [path]
        elif event in ("os.rename", "os.link", "os.symlink", "shutil.copyfile", "shutil.move"):
            paths = list(arguments[:2])
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree"):
            paths = [arguments[0]]
        else:
            return ""
        paths = [path for path in paths if not isinstance(path, int)]  # descriptors: opened before
        real = [os.path.realpath(os.fsdecode(path)) for path in paths]
        return "".join(
            f"{event} {path} "
            for path in real
            if path != "/dev/null" and not (path + "/").startswith(inside + "/")
        )

    assert writes("open", (str(tmp_path / "run" / ".." / "x"), "w", os.O_WRONLY | os.O_CREAT))
    assert in_a_child(tmp_path, writes) == ""
    assert not list(tmp_path.parent.glob("escaped*"))


# --- what a terminal is shown ------------------------------------------------------------------------

HOSTILE = "\x1b[2J\x1b]8;;http://x\x07\x9b31m\u202egnp\u2028\r\b[bold red]\\[/] \udcff"
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def hostile_alert(alert: Alert) -> Alert:
    from dataclasses import replace

    evidence = {**alert.evidence, f"[red]{HOSTILE}": Evidence(1.0, 0.5)}
    return replace(alert, layer=HOSTILE, advice=(HOSTILE,), evidence=evidence)


@pytest.fixture
def hostile_run(tmp_path: Path) -> Path:
    """All text in it is hostile, as somebody who sends a run directory can make it."""
    sink = RunDirectory(tmp_path / "run")
    info = {**INFO, "model": HOSTILE, "head": HOSTILE, "optimizer": {"name": HOSTILE}, "dtype": HOSTILE}
    sink.start(info)
    for reading, phase in readings(200):
        sink.reading(reading, phase)
    sink.note(Note(HOSTILE, HOSTILE, 5))
    for alert in (AT_RISK, SLINGSHOT):
        sink.alert(hostile_alert(alert), Change.BEGIN)
    sink.close(info, summarize(info, read_run(tmp_path / "run").history, [], [], [], []))
    return tmp_path / "run"


def check_shown(text: str, *, markup: bool = True) -> None:
    assert CONTROL.findall(text) == []
    if markup:
        assert "[bold red]" in text and "[/]" in text, "markup is text"


def test_files_hold_no_control_character_and_give_back_every_one(hostile_run: Path) -> None:
    for name in ("run.json", "readings.jsonl", "alerts.jsonl"):
        assert CONTROL.findall((hostile_run / name).read_text(encoding="utf-8")) == []
    record = read_run(hostile_run)
    assert record.problems == []
    assert record.info["model"] == HOSTILE and record.notes[0].message == HOSTILE
    assert record.alerts[0].layer == HOSTILE


@pytest.mark.parametrize("terminal", [True, False])
def test_the_console_shows_a_hostile_text_as_text(terminal: bool) -> None:
    out = io.StringIO()
    sink = ConsoleSink(Console(file=out, force_terminal=terminal, color_system=None, width=2000))
    sink.start({"head": HOSTILE})
    sink.note(Note("x", HOSTILE + "\nnfi  step 9  CRITICAL", 1))
    sink.alert(hostile_alert(AT_RISK), Change.BEGIN)
    check_shown(out.getvalue())
    assert "\nnfi  step 9" not in out.getvalue(), "nobody else can begin a line of the monitor's"


def test_report_explanations_and_tail_show_a_hostile_run_as_text(
    hostile_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "2000")
    assert cli.main(["report", str(hostile_run), "--no-figure"]) == 0
    check_shown(capsys.readouterr().out)
    for options in (["tail", str(hostile_run)], ["tail", str(hostile_run), "--json"]):
        assert cli.main(options) == 0
        check_shown(capsys.readouterr().out.replace("\\u001b", ""), markup="--json" not in options)
    assert cli.main(["report", str(hostile_run), "--json"]) == 0
    shown = capsys.readouterr().out
    assert CONTROL.findall(shown) == [] and json.loads(shown)["run"]["model"] == HOSTILE
    record = read_run(hostile_run)
    (explanation,) = explain_run(
        record.info, record.history, record.phases, record.alerts, record.notes, record.alerts[0].id
    )
    out = io.StringIO()
    Console(file=out, width=2000).print(explanation)
    check_shown(out.getvalue(), markup=False)


def test_a_wrong_path_is_shown_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "/\x1b[2J/nowhere"]) == 2
    check_shown(capsys.readouterr().err, markup=False)


def test_spelling_out_loses_nothing_and_leaves_symbols() -> None:
    assert escape_controls("‖μ_G‖ → [K]\n\ta") == "‖μ_G‖ → [K]\n\ta"
    assert escape_controls("\x1b\x9b\u202e\udcff") == r"\x1b\x9b\u202e\udcff"
    assert json_line({"μ": HOSTILE}).decode().startswith('{"μ": "') and b"\x1b" not in json_line(HOSTILE)
    assert json.loads(json_line({"μ": HOSTILE})) == {"μ": HOSTILE}


# --- the tab -----------------------------------------------------------------------------------------


def test_the_tab_serves_its_own_static_files_and_no_path_out_of_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.application import TensorBoardWSGI
    from tensorboard.plugins.base_plugin import TBContext
    from werkzeug.test import Client

    from nfi_monitor.integrations.tensorboard.plugin import NFIPlugin

    plugin = NFIPlugin(TBContext(data_provider=None))
    static = ROOT / "integrations" / "tensorboard" / "static"
    served = {f"/{path.name}" for path in static.iterdir() if path.suffix in (".js", ".css")}
    assert set(plugin.get_plugin_apps()) == served | {"/runs", "/run", "/alert", "/series"}
    client = Client(TensorBoardWSGI([plugin]))
    base = f"/data/plugin/{plugin.plugin_name}"
    assert all(client.get(base + name).status_code == 200 for name in served)
    secret = (ROOT / "integrations" / "tensorboard" / "plugin.py").read_bytes()[:60]
    tried = 0
    for step in ("..", "%2e%2e", "..%2f..", "%252e%252e", "..\\..", "....//", "static/..", "index.js/.."):
        for depth in range(1, 5):
            for target in ("plugin.py", "runs.py", "etc/passwd", "static/index.js", "THIRD_PARTY.md"):
                answer = client.get(f"{base}/{'/'.join([step] * depth)}/{target}")
                assert answer.status_code in (400, 404) and secret not in answer.data, answer.request.path
                tried += 1
    for name in ("run", "alert", "series"):
        answer = client.get(f"{base}/{name}?run=../../../etc/passwd&id=../x")
        assert answer.status_code == 404 and b"root:" not in answer.data
    assert tried == 160


# --- what CI installs --------------------------------------------------------------------------------

PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s;]+)")


def test_everything_that_ci_installs_is_pinned_by_hash_but_torch(shown: Shown) -> None:
    lock = lock_file.locked()
    assert len(lock) > 60 and all(hashes for _, hashes in lock.values())
    assert not lock.keys() & lock_file.NOT_LOCKED
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {lock_file.normal(match[1]): match[2] for match in map(PIN.match, lines) if match}
    assert pins.pop("torch") == "2.13.0"
    assert {name: lock.get(name, ("is missing",))[0] for name in pins} == pins
    shown("trust", len(lock), "packages pinned by hash")


def test_a_lock_without_a_hash_and_an_environment_that_differs_are_named(tmp_path: Path) -> None:
    file = tmp_path / "requirements.lock"
    file.write_text("# a comment\nrich==15.0.0\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"not `name==version --hash.*rich==15"):
        lock_file.locked(file)
    lock = {"a": ("1", ["0"]), "b": ("1", ["0"]), "c": ("1", ["0"])}
    assert lock_file.differing({"a": "1", "b": "2", "d": "1", "torch": "9", "pip": "9"}, lock) == [
        "b: installed is 2, locked is 1",
        "c: installed is nothing, locked is 1",
        "d: installed is 1, locked is nothing",
    ]
    report = {"install": [{"metadata": {"name": "A_b", "version": "1"}, "download_info": {}}]}
    with pytest.raises(ValueError, match="no hash of a-b 1"):
        lock_file.entries(report)
    report["install"][0]["download_info"] = {"archive_info": {"hashes": {"sha256": "ab"}}}
    assert lock_file.entries(report) == ["a-b==1 --hash=sha256:ab"]
