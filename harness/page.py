"""Pages that need no network and no other file: curves of runs, smoothed, laid over each other."""

import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape

UNITS = {"seconds": "s", "memory": "GiB", "kl": "nats per dimension"}
STYLE = """
body{font:16px/1.45 system-ui,sans-serif;color:#1b1b1b;margin:1em auto;max-width:1200px;padding:0 12px}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr));gap:8px}
svg{width:100%;height:auto}
"""


def document(title: str, parts: Iterable[str]) -> str:
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    return f"<!DOCTYPE html>\n<html>{head}<title>{escape(title)}</title><style>{STYLE}</style>\n" + "\n".join(parts)


# ----------------------------------------------------------------------------------------------------------- curves
def curves(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """One plot for each metric of {run: its lines of metrics.jsonl}: every run's values, faint, and smoothed.

    A metric that has one value only, over all steps and runs, is left out.
    """
    values: dict[str, set] = {}
    for row in (row for lines in runs.values() for row in lines):
        for key in row.keys() - {"step"}:
            values.setdefault(key, set()).add(row[key])
    keys = sorted(key for key, found in values.items() if len(found) > 1)
    return f'<div class="curves">{"".join(plot(key, runs) for key in keys)}</div>' if keys else ""


def plot(key: str, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """One metric of every run that has it over the steps, as SVG."""
    from matplotlib import rc_context  # half a second, paid only by who draws
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(4.4, 2.9), layout="constrained")
    axis = drawn.add_subplot()
    for i, (name, rows) in enumerate(runs.items()):
        found = [(row["step"], row[key]) for row in rows if key in row]
        steps, raw = [step for step, _ in found], [value for _, value in found]
        every, color = max(1, len(found) // 400), f"C{i}"
        axis.plot(steps[::every], raw[::every], color, alpha=0.25, linewidth=0.8)
        axis.plot(steps[::every], smoothed(raw)[::every], color, label=name, linewidth=1.5)
    axis.set(title=key, xlabel="step", ylabel=f"{key} [{UNITS[key]}]" if key in UNITS else key)
    axis.grid(alpha=0.3)
    if len(runs) > 1:
        axis.legend(fontsize=8)
    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):  # text stays text
        drawn.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = stream.getvalue()
    return svg[svg.index("<svg") :]


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """The exponential mean s_n = w s_{n-1} + (1 - w) x_n, over 1 - w^n, so that it begins at x_1."""
    found, mean = [], 0.0
    for n, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        found.append(mean / (1 - weight**n))
    return found
