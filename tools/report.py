"""What a compilation tells: a table a person can read, report.json for machines, one HTML page for a look."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.console import duration_text, finite, size_text, table
from tools.costs import CostStep, change_line, cost_cells, energy_json, energy_text, steps_table, unknown_lines

if TYPE_CHECKING:
    from backends.detours import Detour
    from ir.ops.cost import Cost
    from passes.manager import PassReport
    from tools.gate import Fidelity, Quality

# SQNR in dB of a site's output: above the first a site is good, below the second it is where quality is lost.
GREEN, AMBER = 20.0, 12.0
_COLOURS = {"good": "#2e7d32", "fair": "#e09000", "poor": "#c62828"}


@dataclass(frozen=True)
class Report:
    """Everything a compilation measured. phases: name -> seconds; totals: sizes and bits; notes: lines for the user.

    costs: of the program as it came in, then after each pass; energy: also apply the energy model to them; detours:
    sites that the target does not run by the kernels that were asked for; results: names of those of a model that is no
    language model.
    """

    model: str
    passes: str
    out: str
    phases: dict[str, float]
    peak_bytes: int
    reports: tuple[PassReport, ...]
    totals: dict[str, Any]
    quality: Quality | Fidelity | None
    settings: dict[str, Any]
    notes: tuple[str, ...]
    costs: tuple[CostStep, ...] = ()
    energy: bool = False
    detours: tuple[Detour, ...] = ()
    results: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON-able data, schema 1."""
        found = {
            "schema": 1,
            "model": self.model,
            "passes": self.passes,
            "out": self.out,
            "seconds": self.phases,
            "peak_bytes": self.peak_bytes,
            "totals": self.totals,
            "quality": None if self.quality is None else self.quality.as_json(),
            "settings": self.settings,
            "notes": list(self.notes),
            "detours": [one.as_json() for one in self.detours],
            "cost": {"batch": 1, "tokens": 1, "past": 0, "steps": [step.as_json() for step in self.costs]},
            "pipeline": [
                _pass_json(report) | _work_json(self.costs[index : index + 2])
                for index, report in enumerate(self.reports)
            ],
        }
        return found | ({"energy": energy_json(_ends(self.costs))} if self.energy and self.costs else {})


def _work_json(around: Sequence[CostStep]) -> dict[str, Any]:
    """Return what a pass made of the work of a token; around: the steps before and after it."""
    return {f"cost_{when}": asdict(step.cost) for when, step in zip(("before", "after"), around, strict=False)}


def _ends(steps: Sequence[CostStep]) -> dict[str, Cost]:
    return {"before": steps[0].cost, "after": steps[-1].cost}


def _pass_json(report: PassReport) -> dict[str, Any]:
    return {
        "pass": report.text,
        "seconds": report.seconds,
        "peak_bytes": report.peak_bytes,
        "changed": report.changed,
        "probe_relative_error": report.probe_error,
        "sites": [{"site": s.site, **s.figures} for s in report.sites],
        "left_alone": [{"site": d.site, "reason": d.reason} for d in report.diagnostics],
    }


def light(sqnr_db: float) -> str:
    """Return the traffic light of a site's signal-to-noise ratio: good, fair or poor."""
    return "good" if sqnr_db >= GREEN else "fair" if sqnr_db >= AMBER else "poor"


def site_rows(reports: Sequence[PassReport]) -> list[tuple[str, dict[str, float]]]:
    """Return (site, figures) of every site that a pass compressed."""
    return [(s.site, dict(s.figures)) for r in reports for s in r.sites if "sqnr_db" in s.figures]


def site_table(reports: Sequence[PassReport], worst: int | None = 12) -> str:
    """Return the table of compressed sites, the worst first; `worst` None for all, in program order."""
    rows = site_rows(reports)
    if not rows:
        return ""
    shown = rows if worst is None else sorted(rows, key=lambda r: r[1]["sqnr_db"])[:worst]
    lines = [(name, f["bits"], f["rel_error"], f["sqnr_db"], light(f["sqnr_db"])) for name, f in shown]
    counts = {kind: sum(light(f["sqnr_db"]) == kind for _, f in rows) for kind in _COLOURS}
    tally = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)
    head = f"{len(rows)} sites: {tally} (good: SQNR >= {GREEN:g} dB, poor: below {AMBER:g} dB)"
    more = "" if worst is None or len(rows) <= worst else f"; the worst {worst}:"
    return f"{head}{more}\n{table(('site', 'bits', 'rel.err', 'SQNR dB', 'light'), lines)}"


def pass_table(reports: Sequence[PassReport]) -> str:
    """Return a line per pass: what it did, how long it took, how much memory, and its proof where it is exact."""
    rows = []
    for r in reports:
        proof = "-" if r.probe_error is None else f"exact, {r.probe_error:.1e}"
        done = f"{len(r.sites)} sites" if r.changed else "nothing to do"
        rows.append((r.text, done, len(r.diagnostics), proof, duration_text(r.seconds), size_text(r.peak_bytes)))
    return table(("pass", "did", "left alone", "same function", "time", "peak"), rows)


def work_table(report: Report) -> str:
    """Return the work of one token before and after every pass, empty where it was not counted."""
    return steps_table(report.costs) if report.costs else ""


def energy_table(report: Report) -> str:
    """Return the energy model's table for the programs that came in and went out, empty unless it was asked for."""
    return energy_text(_ends(report.costs)) if report.energy and report.costs else ""


def left_alone(reports: Sequence[PassReport], limit: int = 6) -> str:
    """Return the sites passes left alone, one line a reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for r in reports:
        for d in r.diagnostics:
            reasons.setdefault((d.by, d.reason), []).append(d.site)
    lines = []
    for (by, reason), sites in list(reasons.items())[:limit]:
        names = ", ".join(sites[:2]) + (f" and {len(sites) - 2} more" if len(sites) > 2 else "")
        lines.append(f"left alone by {by}: {names}: {reason}")
    hidden = len(reasons) - limit
    return "\n".join(lines + ([f"and {hidden} more reasons, in report.json"] if hidden > 0 else []))


def detours(report: Report) -> str:
    """Return the sites that the target runs in another way than by the kernels asked for, one line a reason."""
    from backends.detours import detour_lines

    return "\n".join(detour_lines(report.detours))


def write_report(report: Report, folder: Path) -> None:
    """Write report.json and report.html into an artifact folder."""
    # An error of zero has infinite SQNR, which JSON cannot say.
    text = json.dumps(finite(report.as_json()), indent=1, allow_nan=False)
    (folder / "report.json").write_text(text, encoding="utf-8")
    (folder / "report.html").write_text(_page(report), encoding="utf-8")


def _page(report: Report) -> str:
    quality = report.quality
    cards = [("model", report.model), ("passes", report.passes), ("time", duration_text(sum(report.phases.values())))]
    cards += [("peak memory", size_text(report.peak_bytes)), ("size", size_text(int(report.totals["stored_bytes"])))]
    bits = report.totals.get("bits_per_weight_compressed")
    cards += [("bits per weight", f"{bits:.3f}")] if bits else []
    if quality is not None:
        cards += [*quality.cards, ("gate", f"{'passed' if quality.passed else 'FAILED'} ({quality.rule})")]
    if report.costs:
        before, after = (cost_cells(step.cost)[0] for step in (report.costs[0], report.costs[-1]))
        cards += [("multiplies a token", f"{before} to {after}")]
    boxes = "".join(f"<div class=card><b>{_e(k)}</b><span>{_e(v)}</span></div>" for k, v in cards)
    passes = f"<pre>{_e(pass_table(report.reports))}</pre><pre>{_e(left_alone(report.reports, 50))}</pre>"
    passes += f"<pre>{_e(detours(report))}</pre>" if report.detours else ""
    passes += _work(report)
    return (
        "<!doctype html><meta charset=utf-8><title>nomul report</title><style>"
        "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
        ".card{display:inline-block;border:1px solid #ccc;border-radius:8px;padding:.5rem 1rem;margin:.3rem}"
        ".card b{display:block;font-size:.8rem;color:#666}pre{background:#f6f6f6;padding:1rem;overflow:auto}"
        "td,th{padding:.1rem .7rem;text-align:right}td:first-child,th:first-child{text-align:left}</style>"
        f"<h1>nomul report</h1>{boxes}<h2>Passes</h2>{passes}{_bars(report)}"
    )


def _work(report: Report) -> str:
    if not report.costs:
        return ""
    lines = [work_table(report), "", change_line(report.costs), *unknown_lines(report.costs[-1].unknown)]
    energy = f"<pre>{_e(energy_table(report))}</pre>" if report.energy else ""
    return f"<h2>Work</h2><pre>{_e(chr(10).join(lines))}</pre>{energy}"


def _bars(report: Report) -> str:
    """Return the sites as rows with a bar each, coloured by the traffic light."""
    rows = site_rows(report.reports)
    if not rows:
        return ""
    cells = "".join(
        f"<tr><td>{_e(name)}</td><td>{f['bits']:.3f}</td><td>{f['rel_error']:.4f}</td><td>{f['sqnr_db']:.1f}</td>"
        f"<td><svg width=220 height=12><rect width={max(2.0, min(220.0, 6 * f['sqnr_db'])):.0f} height=12 "
        f"fill='{_COLOURS[light(f['sqnr_db'])]}'/></svg></td></tr>"
        for name, f in rows
    )
    return (
        "<h2>Sites</h2><p>Bars show the signal-to-noise ratio of a site's output in dB; longer is better.</p>"
        f"<table><tr><th>site<th>bits<th>rel. error<th>SQNR dB<th></tr>{cells}</table>"
    )


def _e(text: object) -> str:
    return html.escape(str(text))
