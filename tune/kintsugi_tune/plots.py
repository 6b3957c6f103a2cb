"""The front and the values of a search as SVG whose marks are links: to be pointed at, focused and followed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from matplotlib.ticker import MaxNLocator

from kintsugi.page import text
from kintsugi_tune.front import chosen, pareto_front
from kintsugi_tune.record import METRICS, SearchRecord, TrialRecord
from kintsugi_tune.values import UNITS, Axis, Value, axes, trial_told, values_told

Point = tuple[float, float]
Box = tuple[float, float, float, float]
STATES: Mapping[str, str] = {
    "complete": "complete", "pruned": "stopped early", "failed": "failed", "running": "running"
}  # fmt: skip
_WIDTH, _HEIGHT = 720.0, 470.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 66.0, 30.0, 44.0, 62.0
_GAP, _AXIS_TOP, _AXIS_BOTTOM = 76.0, 64.0, 330.0
_FAR = 1
"""What lies further from the complete trials than so many times their range is out of sight."""


@dataclass
class _Frame:
    """The ranges of a plot in data units, and the boxes in px that marks and labels take."""

    x: Point
    y: Point
    taken: list[Box] = field(default_factory=list)

    def place(self, point: Point) -> Point:
        """Data to px; what is out of sight comes to the edge."""
        (left, right), (low, high) = self.x, self.y
        across, up = (
            min(1.0, max(0.0, v)) for v in ((point[0] - left) / (right - left), (point[1] - low) / (high - low))
        )
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM)

    def holds(self, point: Point) -> bool:
        return self.x[0] <= point[0] <= self.x[1] and self.y[0] <= point[1] <= self.y[1]

    def label(self, at: Point, words: str, kind: str, reach: float = 7) -> str:
        """Words beside a mark at `at` px, on the first side where they cover nothing."""
        x, y = at
        wide = 7.6 * len(words)
        near = reach + 4
        beside = [(near, 5, "start"), (-near, 5, "end"), (0, -near, "middle"), (0, near + 11, "middle")]
        sides = [*beside, (10, -10, "start"), (10, 20, "start"), (-10, -10, "end"), (-10, 20, "end")]
        boxes = [_box(x + dx, y + dy, wide, anchor) for dx, dy, anchor in sides]
        free = next((i for i, box in enumerate(boxes) if not any(_meet(box, other) for other in self.taken)), 0)
        dx, dy, anchor = sides[free]
        self.taken.append(boxes[free])
        return f'<text class="{kind}" x="{x + dx:.1f}" y="{y + dy:.1f}" text-anchor="{anchor}">{text(words)}</text>'


def front_plot(record: SearchRecord, colours: Mapping[int, str], links: Mapping[int, str]) -> str:
    """The first two objectives of every trial against each other; one objective against the trial's number.

    Empty before a trial is complete.

    Args:
        colours: trial number -> colour.
        links: trial number -> where its mark leads, within the page.
    """
    if not record.complete:
        return ""
    points, origin = _points(record), _origin(record)
    frame = _seen(record, points, origin)
    front, best = pareto_front(record.trials), chosen(record)
    order = sorted(record.trials, key=lambda t: (t.state == "complete", t in front, t == best))
    drawn = [trial for trial in order if trial.number in points and frame.holds(points[trial.number])]
    frame.taken += [_around(frame.place(points[t.number]), 13 if t == best else 7) for t in drawn]
    parts = [*_grid(frame, record), _staircase(frame, [points[trial.number] for trial in front], record)]
    if origin:
        parts.append(_origin_mark(frame, origin))
    for trial in drawn:
        at, colour = points[trial.number], colours.get(trial.number, "")
        inside = _marks(frame, at, trial, member=trial in front, best=trial == best)
        parts.append(_link(record, trial, links, "point", colour, inside))
    named = (trial for trial in reversed(drawn) if trial.label or trial in front)
    for trial in named:
        at, words = frame.place(points[trial.number]), trial.label or str(trial.number)
        parts.append(frame.label(at, words, "name", 13 if trial == best else 7))
    return _svg("front", (_WIDTH, _HEIGHT), "the trials by what they reach", parts)


def out_of_sight(record: SearchRecord) -> list[str]:
    """What is too far from the complete trials for `front_plot` to show it where it is, in words."""
    points, origin = _points(record), _origin(record)
    if not record.complete:
        return []
    frame = _seen(record, points, origin)
    away = sum(not frame.holds(point) for point in points.values())
    words = [f"the last figures of trials that are not complete ({away})"] if away else []
    if origin and not frame.holds(origin):
        figures = " / ".join(f"{record.origin[name]:.2f}" for name in record.objectives[:2])
        words.append(f"the degraded images, at {figures} dB, marked at the edge")
    return words


def parallel_plot(record: SearchRecord, links: Mapping[int, str]) -> str:
    """A line for each complete trial across its values, its objectives and its score.

    Before any is complete, of each that has a score.
    """
    trials = list(record.complete) or [trial for trial in record.trials if trial.best]
    if not trials:
        return ""
    ranked = sorted(trials, key=lambda trial: trial.score)
    colours = {t.number: ramp(rank / max(1, len(ranked) - 1)) for rank, t in enumerate(ranked)}
    front = pareto_front(trials)
    columns = [*axes(record, trials), *_figure_axes(record, trials)]
    places = [column.places() for column in columns]
    parts: list[str] = []
    for trial in sorted(ranked, key=lambda trial: trial in front):
        path = _path(places, trial.number)
        inside = f'<path class="hit" d="{path}"/><path class="shown" d="{path}"/>'
        kind = "line member" if trial in front else "line"
        parts.append(_link(record, trial, links, kind, colours[trial.number], inside))
    parts += [_axis(column, place) for place, column in enumerate(columns)]
    size = (_GAP * len(columns), _AXIS_BOTTOM + 30)
    return f'<div class="scroll">{_svg("parallel", size, "the values of all trials", parts)}</div>'


def ramp(share: float) -> str:
    """The colour of a rank from 0, the worst, to 1."""
    low, high = (0x7C, 0x83, 0xA6), (0xF5, 0x7C, 0x0B)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(low, high, strict=True))


def mark_shape(kind: str, x: float = 0, y: float = 0) -> str:
    """What a trial is drawn as: `member` of the front and `other` are complete, `known` named, `open` neither."""
    if kind == "known":
        return f'<path class="known" d="M{x:.1f} {y - 8:.1f}l8 8l-8 8l-8-8z"/>'
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}"/>'


def origin_shape(x: float = 0, y: float = 0) -> str:
    """What the degraded images are drawn as."""
    return f'<path class="origin" d="M{x - 6:.1f} {y - 6:.1f}l12 12m0-12l-12 12"/>'


def _svg(kind: str, size: Point, told: str, parts: Sequence[str]) -> str:
    return (
        f'<svg class="{kind}" viewBox="0 0 {size[0]:g} {size[1]:g}" style="--wide:{size[0]:g}px" role="group" '
        f'aria-label="{told}">{"".join(parts)}</svg>'
    )


def _link(
    record: SearchRecord, trial: TrialRecord, links: Mapping[int, str], kind: str, colour: str, inside: str
) -> str:
    style = f' style="--c:{colour}"' if colour else ""
    lines = "\n".join(_lines(record, trial))
    # A line is reached by its trial's point: tabbing through both would be twice the way.
    order = ' tabindex="-1"' if kind.startswith("line") else ""
    return (
        f'<a class="{kind}" href="{links[trial.number]}" data-trial="{trial.number}"{order}{style}>'
        f"<title>{text(lines)}</title>{inside}</a>"
    )


def _lines(record: SearchRecord, trial: TrialRecord) -> Iterator[str]:
    yield f"trial {trial_told(trial)}, {STATES[trial.state]} after {trial.epochs} epochs"
    last = trial.curve[-1] if trial.curve else {}
    for name in record.objectives:
        if (value := trial.point.get(name, last.get(METRICS[name]))) is not None:
            gain = f" ({value - record.origin[name]:+.2f} over degraded)" if name in record.origin else ""
            yield f"{UNITS[name]} {value:.2f}{gain}"
    yield from values_told(trial)


def _points(record: SearchRecord) -> dict[int, Point]:
    return {trial.number: found for trial in record.trials if (found := _point(record, trial)) is not None}


def _point(record: SearchRecord, trial: TrialRecord) -> Point | None:
    """Its place: of a trial that is not complete by its last figures."""
    last = trial.curve[-1] if trial.curve else {}
    found = trial.point or {name: last[METRICS[name]] for name in record.objectives if METRICS[name] in last}
    values = [found[name] for name in record.objectives if name in found]
    if len(values) < len(record.objectives):
        return None
    return (values[0], values[1]) if len(values) > 1 else (float(trial.number), values[0])


def _origin(record: SearchRecord) -> Point | None:
    values = [record.origin[name] for name in record.objectives if name in record.origin]
    if len(values) < len(record.objectives):
        return None
    return (values[0], values[1]) if len(values) > 1 else (-1.0, values[0])


def _seen(record: SearchRecord, points: Mapping[int, Point], origin: Point | None) -> _Frame:
    return _frame([points[t.number] for t in record.complete], [*points.values(), *([origin] if origin else [])])


def _frame(core: Sequence[Point], others: Sequence[Point]) -> _Frame:
    """As wide as the core, and as those others that are not far from it."""
    spans = [max(0.2, max(values) - min(values)) for values in zip(*core, strict=True)]
    lows = [min(values) for values in zip(*core, strict=True)]
    near = [
        point
        for point in others
        if all(-_FAR * span <= v - low <= (1 + _FAR) * span for v, low, span in zip(point, lows, spans, strict=True))
    ]
    x, y = (_padded([*values]) for values in zip(*core, *near, strict=True))
    return _Frame(x, y)


def _padded(values: Sequence[float]) -> Point:
    pad = 0.07 * max(0.2, max(values) - min(values))
    return min(values) - pad, max(values) + pad


def _grid(frame: _Frame, record: SearchRecord) -> Iterator[str]:
    first, *more = (UNITS[name] for name in record.objectives)
    across, up = (first, more[0]) if more else ("trial", first)
    ticks = MaxNLocator(5)
    for value in ticks.tick_values(*frame.x):
        if frame.x[0] <= value <= frame.x[1]:
            x, _ = frame.place((value, frame.y[0]))
            yield f'<path class="grid" d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>'
            yield f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 22}" text-anchor="middle">{value:g}</text>'
    for value in ticks.tick_values(*frame.y):
        if frame.y[0] <= value <= frame.y[1]:
            _, y = frame.place((frame.x[0], value))
            yield f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
            yield f'<text x="{_LEFT - 8}" y="{y + 5:.1f}" text-anchor="end">{value:g}</text>'
    yield f'<text class="title" x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 8}" text-anchor="end">{across} →</text>'
    yield f'<text class="title" x="4" y="20">↑ {up}</text>'


def _staircase(frame: _Frame, front: Sequence[Point], record: SearchRecord) -> str:
    """The edge of what the front dominates; of one objective the best value."""
    (left, bottom), (right, best) = frame.place((frame.x[0], frame.y[0])), frame.place((frame.x[1], front[0][1]))
    if len(record.objectives) == 1:
        return f'<path class="stairs" d="M{left:.1f} {best:.1f}H{right:.1f}"/>'
    if len(record.objectives) > 2:
        return ""
    steps = [frame.place(point) for point in sorted(front)]
    path = f"M{left:.1f} {steps[0][1]:.1f}" + "".join(f"V{y:.1f}H{x:.1f}" for x, y in steps) + f"V{bottom:.1f}"
    return f'<path class="under" d="{path}H{left:.1f}Z"/><path class="stairs" d="{path}"/>'


def _marks(frame: _Frame, at: Point, trial: TrialRecord, *, member: bool, best: bool) -> str:
    x, y = frame.place(at)
    kind = "open" if trial.state != "complete" else "known" if trial.label else "member" if member else "other"
    ring = f'<circle class="best" cx="{x:.1f}" cy="{y:.1f}"/>' if best else ""
    return f'<circle class="hit" cx="{x:.1f}" cy="{y:.1f}"/>{ring}{mark_shape(kind, x, y)}'


def _origin_mark(frame: _Frame, origin: Point) -> str:
    x, y = frame.place(origin)
    if not frame.holds(origin):
        # Off the edge, where the axes' own figures are.
        x, y = min(max(x, _LEFT + 14), _WIDTH - _RIGHT - 14), min(max(y, _TOP + 14), _HEIGHT - _BOTTOM - 16)
    frame.taken.append(_around((x, y), 7))
    return origin_shape(x, y) + frame.label((x, y), "degraded", "soft")


def _figure_axes(record: SearchRecord, trials: Sequence[TrialRecord]) -> Iterator[Axis]:
    for name in dict.fromkeys((*record.objectives, "score")):
        values: dict[int, Value] = {
            trial.number: trial.point.get(name, trial.best[METRICS[name]])
            for trial in trials
            if name in trial.point or METRICS[name] in trial.best
        }
        if values:
            yield Axis(UNITS[name].partition(",")[0], "dB", values)


def _path(places: Sequence[Mapping[int, float]], number: int) -> str:
    """Straight from axis to axis; an axis for which the trial has no value is passed over."""
    points = [
        f"{(place + 0.5) * _GAP:.1f} {_AXIS_BOTTOM - column[number] * (_AXIS_BOTTOM - _AXIS_TOP):.1f}"
        for place, column in enumerate(places)
        if number in column
    ]
    return "M" + "L".join(points)


def _axis(axis: Axis, place: int) -> str:
    x = (place + 0.5) * _GAP
    heads = f'<text class="title" x="{x}" y="16">{text(axis.group)}</text><text x="{x}" y="33">{text(axis.part)}</text>'
    return f'<g class="axis">{heads}<path d="M{x} {_AXIS_TOP}V{_AXIS_BOTTOM}"/>{"".join(_ticks(axis, x))}</g>'


def _ticks(axis: Axis, x: float) -> Iterator[str]:
    if axis.choices:
        steps = max(1, len(axis.choices) - 1)
        for i, choice in enumerate(axis.choices):
            y = _AXIS_BOTTOM - i / steps * (_AXIS_BOTTOM - _AXIS_TOP)
            yield f'<text class="choice" x="{x + 5}" y="{y + 4:.1f}">{text(str(choice))}</text>'
    else:
        values = [float(value) for value in axis.values.values()]
        yield f'<text x="{x}" y="{_AXIS_BOTTOM + 20}">{min(values):.3g}</text>'
        yield f'<text x="{x}" y="{_AXIS_TOP - 10}">{max(values):.3g}</text>'


def _around(at: Point, reach: float) -> Box:
    return at[0] - reach, at[1] - reach, at[0] + reach, at[1] + reach


def _box(x: float, y: float, wide: float, anchor: str) -> Box:
    left = x - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
    return left, y - 12, left + wide, y + 3


def _meet(one: Box, other: Box) -> bool:
    """Whether they overlap, or the first leaves the plot."""
    apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    outside = one[0] < _LEFT or one[2] > _WIDTH or one[3] > _HEIGHT - _BOTTOM
    return outside or not apart
