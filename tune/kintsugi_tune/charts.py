"""Curves of a search as SVG to be set into an HTML page."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kintsugi.evaluation.charts import INK, svg
from kintsugi_tune.front import chosen, hypervolume_after, pareto_front, reference
from kintsugi_tune.influence import by_chance, correlations, importances
from kintsugi_tune.record import METRICS, SearchRecord, TrialRecord
from kintsugi_tune.values import UNITS

COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#a855f7", "#06b6d4", "#ec4899", "#84a916")
_WIDTH = 5.6


def followed(record: SearchRecord) -> dict[int, tuple[TrialRecord, str]]:
    """Trial number -> trial and its colour: as much of the front as there are colours, and the reference.

    The chosen member is always among them. Before any trial is complete, those with the highest scores.
    """
    front = pareto_front(record.trials)
    best = chosen(record)
    if best is not None and best in front[len(COLOURS) :]:
        front = [*front[: len(COLOURS) - 1], best]
    leading = sorted((trial for trial in record.trials if trial.curve), key=lambda trial: -trial.score)
    shown = {t.number: (t, colour) for t, colour in zip(front or leading, COLOURS, strict=False)}
    if (base := reference(record)) is not None and base.curve:
        shown.setdefault(base.number, (base, INK))
    return shown


def hypervolume_chart(record: SearchRecord) -> str:
    """The front's hypervolume over the degraded images, trial by trial."""
    volumes = hypervolume_after(record)
    power = {1: "", 2: "²", 3: "³"}[len(record.objectives)]

    def draw(axes: Any) -> None:
        places = range(1, len(volumes) + 1)
        axes.step(places, volumes, where="post", color=COLOURS[0], linewidth=1.8)
        axes.plot(places, volumes, "o", color=COLOURS[0], markersize=3.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(title="Gained together", xlabel="complete trials, as they ended", ylabel=f"hypervolume, dB{power}")
        axes.set_ylim(bottom=min(0.0, min(volumes)))

    return svg(draw, "hypervolume")


def importance_chart(record: SearchRecord) -> str:
    """The share of each of the searcher's coordinates for each objective; empty where nothing can be said."""
    shares = {name: importances(record, name) for name in record.objectives}
    shares = {name: each for name, each in shares.items() if each}
    if not shares:
        return ""
    order = sorted(_labels(shares), key=lambda label: -max(each[label] for each in shares.values()))

    def draw(axes: Any) -> None:
        _bars(axes, {name: {label: 100 * each[label] for label in order} for name, each in shares.items()})
        axes.set_title("Importance", loc="left")
        axes.set(xlabel="share of what sets the best quarter apart, %")

    return svg(draw, "importance", (_WIDTH, _height(shares)))


def correlation_chart(record: SearchRecord) -> str:
    """Rank correlations of each value with each objective; empty where nothing can be said."""
    found = {name: correlations(record, name) for name in record.objectives}
    if not any(found.values()):
        return ""
    chance = by_chance(len(record.complete))

    def draw(axes: Any) -> None:
        axes.axvspan(-chance, chance, color="#8a8a8a", alpha=0.18, linewidth=0)
        axes.axvline(0, color=INK, linewidth=0.8)
        _bars(axes, found)
        axes.set_title("Direction", loc="left")
        axes.set(xlabel="rank correlation with the value; grey: may be chance", xlim=(-1, 1))

    return svg(draw, "correlation", (_WIDTH, _height(found)))


def curve_charts(shown: Mapping[int, tuple[TrialRecord, str]]) -> Iterator[str]:
    """One chart for each metric: validation first, then the total loss and its terms."""
    metrics = dict.fromkeys(name for trial, _ in shown.values() for metric in trial.curve for name in metric)
    terms = sorted(name for name in metrics if name.startswith("loss/") and name != "loss/total")
    for name in (*(METRICS[key] for key in ("psnr", "defect_psnr", "score")), "loss/total", *terms):
        if name in metrics:
            yield _curve_chart(name, list(shown.values()))


def _curve_chart(name: str, shown: Sequence[tuple[TrialRecord, str]]) -> str:
    titles = {METRICS[key]: told for key, told in UNITS.items()}

    def draw(axes: Any) -> None:
        for trial, colour in shown:
            points = [(metrics["epoch"], metrics[name]) for metrics in trial.curve if name in metrics]
            if points:
                mark = "o" if len(points) == 1 else ""
                axes.plot(*np.transpose(points), color=colour, linewidth=1.6, marker=mark, markersize=4)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(title=titles.get(name, name.replace("/", ": ")), xlabel="epoch")

    return svg(draw, name)


def _bars(axes: Any, groups: Mapping[str, Mapping[str, float]]) -> None:
    """Horizontal bars side by side, the first entry on top."""
    labels = _labels(groups)
    colours = COLOURS[5:]
    thick = 0.8 / len(groups)
    for place, (name, values) in enumerate(groups.items()):
        rows = np.arange(len(labels)) + (place - (len(groups) - 1) / 2) * thick
        axes.barh(rows, [values.get(label, 0.0) for label in labels], thick, color=colours[place], label=UNITS[name])
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.figure.legend(loc="outside upper right", ncols=len(groups))


def _labels(groups: Mapping[str, Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(label for values in groups.values() for label in values))


def _height(groups: Mapping[str, Mapping[str, float]]) -> float:
    return 1.0 + 0.3 * len(_labels(groups))
