"""PROOFS.md: the kept records as tables. All numbers of the page are counted here."""

from __future__ import annotations

import datetime
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tests.benchmarks.detection import generate
from tests.benchmarks.detection.families import EDGE, EXTERNAL, NUMERIC, SECOND_MOMENT
from tests.benchmarks.detection.proofs.kept import monitor_key
from tests.benchmarks.detection.proofs.subjects import ABSORBS, EVERY_STEP
from tests.benchmarks.detection.proofs.trial import CONFIRMED
from tests.benchmarks.detection.sheet import NOTHING, Sheet, share

Record = dict[str, Any]
UNKNOWN = "unknown"
OTHERS = (SECOND_MOMENT, EDGE)

AGREE_NUMERIC, AGREE_OTHERS, AGREE_EXTERNAL = (0.95, 60), (0.9, 40), (0.9, 40)  # share, trials
AVERTED, TWINS, READ, LOST = 0.95, 0.95, 0.15, 1.0


# --- what was found -----------------------------------------------------------------------------------


def events_of(records: Iterable[Record]) -> Iterator[tuple[Record, Record]]:
    """(run, slingshot) of all runs that slingshot by themselves."""
    for record in records:
        for event in record.get("events", ()):
            yield record, event


def truth_of(event: Record) -> str:
    """The verdict of the replay; empty where there was none, or where it did not repeat the run."""
    replay = event["replay"]
    return "" if replay is None or replay["reproduced"] is False else str(replay["mechanism"])


def kicked(records: Iterable[Record], *, alone: bool = True) -> list[Record]:
    """Kicked runs whose loss rises with the kick and not without it.

    ``alone``: not those in which another cause was needed as well (a replay averts the rise by removing
    it): there two names are right.
    """
    rises = [
        r for r in records if r["kind"] == EXTERNAL and r["external"]["rises"] and r["external"]["clean"]
    ]
    return [record for record in rises if not (alone and _needs_another(record["external"]))]


def _needs_another(found: Record) -> bool:
    return found["replay"] is not None and found["replay"]["mechanism"] not in (EXTERNAL, UNKNOWN)


def warned(records: Sequence[Record]) -> dict[str, tuple[int, int]]:
    """ "auto", "every" → (slingshots with an *imminent* before them, all), of runs read both ways."""
    auto = {(r["family"], r["seed"]): r for r in records if r["kind"] not in (EVERY_STEP, ABSORBS, EXTERNAL)}
    every = {(r["family"], r["seed"]): r for r in records if r["kind"] == EVERY_STEP}
    both = auto.keys() & every.keys()
    found = {}
    for name, runs in (("auto", auto), ("every", every)):
        leads = [lead for run in both for _, lead in runs[run]["warned"]]
        found[name] = sum(lead is not None for lead in leads), len(leads)
    return found


# --- targets ------------------------------------------------------------------------------------------


def _row(what: str, wanted: float, hits: int, of: int, least: int = 0, apart: str = "") -> list[str]:
    number = f"≥ {wanted:g}" + (f" of ≥ {least}" if least else "")
    if not of:
        return [what, number, NOTHING, "not measured"]
    reached = hits >= wanted * of - 1e-9
    word = "yes" if reached and of >= least else f"too few: {least - of} more" if reached else "**no**"
    return [what, number, f"{hits / of:.3f}: {share(hits, of)}{apart}", word]


def targets(records: Sequence[Record]) -> Sheet:
    rows = []
    groups = (
        (NUMERIC, (NUMERIC,), AGREE_NUMERIC),
        ("second moment, edge of stability", OTHERS, AGREE_OTHERS),
    )
    for name, truths, (wanted, least) in groups:
        held = [event for _, event in events_of(records) if truth_of(event) in truths]
        called = [event for event in held if event["named"] != "none"]
        right = sum(event["named"] == truth_of(event) for event in called)
        silent = f"; {len(held) - len(called)} not called"
        rows.append(_row(f"mechanism, {_words(name)}", wanted, right, len(called), least, silent))
    rows.append(_external_row(records))
    for name, truths, moments in (
        ("numeric", (NUMERIC,), ("first", "imminent")),
        ("second moment, edge of stability", OTHERS, ("first", "imminent")),
    ):
        for moment in moments:
            held = [event for _, event in events_of(records) if truth_of(event) in truths]
            tried = [event[moment] for event in held if event[moment] is not None]
            hits = sum(item["averted"] for item in tried)
            when = "the first alarm" if moment == "first" else "imminent"
            silent = f"; {len(held) - len(tried)} without an alarm{_out_of_reach(tried)}"
            rows.append(_row(f"averted from {when} on, {name}", AVERTED, hits, len(tried), 0, silent))
    twins = [twin for record in records for twin in record.get("twins", ())]
    confirmed = sum(twin["confirmed"] for twin in twins)
    rows.append(_row("at risk confirmed by the float64 twin", TWINS, confirmed, len(twins)))
    rows += _reading_rows(records)
    return Sheet("Targets", "", ["", "target", "measured", "reached"], rows)


def _out_of_reach(tried: Sequence[Record]) -> str:
    """How many slingshots come although nothing is updated any more after the alarm."""
    reached = [item for item in tried if item["in_reach"]]
    if len(reached) == len(tried):
        return ""
    rest = share(sum(item["averted"] for item in reached), len(reached))
    return f"; {len(tried) - len(reached)} come even if training stops at the alarm, of the others {rest}"


def _external_row(records: Sequence[Record]) -> list[str]:
    held = [record["external"] for record in kicked(records)]
    called = [item for item in held if item["named"] != "none"]
    right = sum(item["named"] == EXTERNAL for item in called)
    wanted, least = AGREE_EXTERNAL
    silent = f"; {len(held) - len(called)} not called"
    return _row("mechanism, external", wanted, right, len(called), least, silent)


def _reading_rows(records: Sequence[Record]) -> Iterator[list[str]]:
    read = {f"{r['family']}-{r['seed']}": r["read"] / r["steps"] for r in records if r["kind"] == ABSORBS}
    what, number = "share of steps read, runs that absorb", f"≤ {READ:.0%} in each"
    if read:
        worst, middle = max(read.values()), statistics.median(read.values())
        word = "yes" if worst <= READ else "**no**"
        yield [what, number, f"median {middle:.0%}, most {worst:.0%} of {len(read)} runs", word]
    else:
        yield [what, number, NOTHING, "not measured"]
    found = warned(records)
    what, number = 'recall that every="auto" loses, imminent', f"≤ {LOST:g} point"
    if found["every"][1]:
        shares = {name: 100 * hits / of for name, (hits, of) in found.items()}
        lost = shares["every"] - shares["auto"]
        said = f"{lost:.1f} points ({share(*found['auto'])} auto, {share(*found['every'])} every step)"
        yield [what, number, said, "yes" if lost <= LOST else "**no**"]
    else:
        yield [what, number, NOTHING, "not measured"]


# --- tables -------------------------------------------------------------------------------------------


def sheets(records: Sequence[Record]) -> list[Sheet]:
    return [
        targets(records),
        _mechanisms(records),
        _kicks(records),
        _averted(records),
        _twins(records),
        _reading(records),
        _disagreements(records),
    ]


def _mechanisms(records: Sequence[Record]) -> Sheet:
    table: dict[str, Counter[str]] = {}
    for _, event in events_of(records):
        table.setdefault(truth_of(event) or "no replay", Counter())[event["named"]] += 1
    for record in kicked(records):
        table.setdefault("external, by construction", Counter())[record["external"]["named"]] += 1
    names = [NUMERIC, *OTHERS, EXTERNAL, UNKNOWN, "none"]
    rows = [
        [_words(truth), *(str(counter[name]) for name in names), str(counter.total())]
        for truth, counter in table.items()
    ]
    note = "Rows: what the replay says. Columns: what the alert says at the end of the run; none: not called."
    return Sheet("Mechanism", note, ["truth", *map(_words, names), "all"], rows)


def _kicks(records: Sequence[Record]) -> Sheet:
    rows = []
    runs = [record for record in records if record["kind"] == EXTERNAL]
    for what, wanted in (
        *((kind, {"kick": kind}) for kind in ("bad batch", "corrupt gradient", "rate jump")),
        *((net, {"net": net}) for net in sorted({record["external"]["net"] for record in runs})),
    ):
        own = [
            r
            for r in runs
            if wanted == {"kick": r["external"]["kick"]} or wanted == {"net": r["external"]["net"]}
        ]
        rises = [record["external"] for record in kicked(own, alone=False)]
        held = [item for item in rises if not _needs_another(item)]
        called = [item for item in held if item["named"] != "none"]
        replayed = [item["replay"]["mechanism"] for item in rises if item["replay"] is not None]
        calm = [r["external"] for r in own if not r["external"]["rises"]]
        rows.append(
            [
                what,
                str(len(own)),
                str(len(rises)),
                str(len(rises) - len(held)),
                share(len(called), len(held)),
                share(sum(item["named"] == EXTERNAL for item in called), len(called)),
                share(replayed.count(EXTERNAL), len(replayed)),
                f"{sum(item['named'] != 'none' for item in calm)} of {len(calm)}",
            ]
        )
    header = [
        "", "runs", "loss rises", "two causes", "called", "named external", "replay says external",
        "called, no rise",
    ]  # fmt: skip
    note = (
        "Kicked runs. The loss rises: two readings in a row above three times the largest of the 50 steps "
        "before, with the kick and not without it. Two causes: a replay averts the rise by removing another "
        "cause, too; those are not counted. Replays: of runs with τ ≤ 200."
    )
    return Sheet("From outside", note, header, rows)


def _averted(records: Sequence[Record]) -> Sheet:
    rows = []
    for family in dict.fromkeys(record["family"] for record, _ in events_of(records)):
        own = [event for record, event in events_of(records) if record["family"] == family]
        cells = []
        for moment in ("first", "imminent"):
            tried = [event[moment] for event in own if event[moment] is not None]
            leads = [item["lead"] for item in tried]
            lead = f", {statistics.median(leads):.1f} τ" if leads else ""
            cells.append(share(sum(item["averted"] for item in tried), len(tried)) + lead)
        actions = Counter(
            str(event["first"]["action"]) for event in own if event["first"] is not None
        )  # None: no function named
        said = ", ".join(f"{name} ({times})" for name, times in actions.items())
        truths = Counter(_words(truth_of(event) or "no replay") for event in own)
        cause = ", ".join(f"{name} {times}" for name, times in truths.items())
        rows.append([family, cause, *cells, said or NOTHING])
    header = ["family", "replays", "first alarm", "imminent", "first advice, read as"]
    note = (
        "Slingshots averted, of those with such an alarm, and the median lead. An alarm: imminent, or at "
        "risk; where rounding is named, at risk of severity warning. The action is what the first "
        "line of the alert's advice names; None: it names none that is known."
    )
    return Sheet("Averted by the first advice", note, header, rows)


def _twins(records: Sequence[Record]) -> Sheet:
    rows = []
    for family in dict.fromkeys(record["family"] for record in records if record.get("twins")):
        own = [twin for r in records if r["family"] == family for twin in r.get("twins", ())]
        parts = [sum(twin[name]["confirmed"] for twin in own) for name in ("feature_mean", "weight_norm")]
        averted = sum(bool(twin["float64_averts"]) for twin in own)
        followed = sum(twin["slingshot"] is not None for twin in own)
        cells = [share(sum(twin["confirmed"] for twin in own), len(own)), *map(str, parts)]
        rows.append([family, *cells, f"{averted} of {followed}"])
    header = ["family", "confirmed", "by the feature mean", "by the weight norm", "float64 averts"]
    return Sheet("Warnings, held against the float64 twin", CONFIRMED, header, rows)


def _reading(records: Sequence[Record]) -> Sheet:
    rows = [
        [
            f"{r['family']}-{r['seed']}",
            f"{r['steps']:,}",
            f"{r['read'] / r['steps']:.0%}",
            str(len(r["warned"])),
        ]
        for r in records
        if r["kind"] == ABSORBS
    ]
    header = ["run", "steps", "read", "slingshots"]
    return Sheet("Steps read in full", 'Runs that absorb for good, every="auto".', header, rows)


def _disagreements(records: Sequence[Record]) -> Sheet:
    rows = []
    for record, event in events_of(records):
        run, truth = f"{record['family']}-{record['seed']}", truth_of(event)
        where = f"{run} at {event['start']:,}"
        if truth and truth not in (UNKNOWN, event["named"]):
            rows.append(
                [where, f"named {_words(event['named'])}", f"replay: {event['replay']['reasons'][1:2]}"]
            )
        for moment in ("first", "imminent"):
            tried = event[moment]
            if truth not in ("", UNKNOWN) and tried is not None and not tried["averted"]:
                found = f"{tried['action']} at {tried['step']:,}, {tried['lead']:.1f} τ ahead"
                reach = "" if tried["in_reach"] else ", as if training had stopped"
                said = f"{found}; spiked at {tried['spiked_at']}{reach}"
                rows.append([where, f"not averted ({moment})", said])
    for record in records:
        run = f"{record['family']}-{record['seed']}"
        for twin in record.get("twins", ()):
            if not twin["confirmed"]:
                mean = {name: value for name, value in twin["feature_mean"].items() if name != "confirmed"}
                rows.append([f"{run} at {twin['step']:,}", "warning not confirmed", json.dumps(mean)])
    for record in kicked(records):
        found = record["external"]
        if found["named"] != EXTERNAL:
            run = f"{record['family']}-{record['seed']} at {found['first']:,}"
            rows.append([run, f"named {_words(found['named'])}", _kick_in_words(found)])
    return Sheet("Disagreements", "" if rows else "None.", ["where", "what", "why"], rows)


def _kick_in_words(found: Record) -> str:
    replay = "not replayed" if found["replay"] is None else f"replay {_words(found['replay']['mechanism'])}"
    peak = "not finite" if found["peak"] is None else f"{found['peak']:.3g}"
    return f"{found['what']}; loss {found['before']:.2g} → {peak}; {replay}"


def _words(name: str) -> str:
    return name.replace("_", " ")


# --- lines and page -------------------------------------------------------------------------------------


def in_a_line(record: Record) -> str:
    """One run, for the progress of the command."""
    said = f"read {record['read'] / record['steps']:.0%}"
    if "external" in record:
        found = record["external"]
        rises = "rises" if found["rises"] and found["clean"] else "does not rise"
        return f"{said}; {rises}, named {found['named']}; {_kick_in_words(found)}"
    for event in record.get("events", ()):
        said += f"; {event['start']}: {event['named']}/{truth_of(event) or 'no replay'}"
        for moment in ("first", "imminent"):
            if event[moment] is not None:
                said += f", {moment} −{event[moment]['lead']:.1f} τ averted {event[moment]['averted']}"
    twins = record.get("twins", ())
    return said + (f"; twins {sum(twin['confirmed'] for twin in twins)}/{len(twins)}" if twins else "")


def failures(records: Sequence[Record]) -> Iterator[str]:
    """Kicked runs whose cause was not named, with the evidence of the alert."""
    for record in kicked(records):
        found = record["external"]
        if found["named"] == EXTERNAL:
            continue
        yield f"{record['family']}-{record['seed']}: {_kick_in_words(found)}"
        yield f"    kicked at {found['first']}; called at {found['called']}, named {found['named']}"
        if found["called"] is not None:
            yield f"    confidence {found['confidence']:.2f}, {found['severity']}; advice: {found['advice']}"
            for name, item in found["evidence"].items():
                yield f"    {name}: " + ", ".join(f"{key} {value}" for key, value in item.items())


def page(made: Sequence[Sheet], kept: int, of: int) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in generate.versions().items())
    lines = [
        "# What the warnings were worth",
        "",
        "Written by `python -m tests.benchmarks.detection.proofs` on "
        f"{datetime.date.today().isoformat()}; do not edit. {versions}; monitor code {monitor_key()}. "
        f"{kept} of {of} runs were made by this code.",
        "",
        "Each run is watched by `Monitor(model, optimizer)` with its defaults. Then it goes on in other ways "
        "from snapshots that were taken when its alerts were heard (`trial.py` says how). [Brackets]: 95% "
        "Wilson intervals.",
        "",
    ]
    return "\n".join(lines) + "\n" + "\n".join(sheet.markdown() for sheet in made)
