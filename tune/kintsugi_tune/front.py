"""Which of many models are better than all others in some way, and how much they gain together."""

from collections.abc import Iterable, Mapping, Sequence

from kintsugi_tune.record import METRICS, SearchRecord, TrialRecord


def pareto_front(trials: Iterable[TrialRecord]) -> list[TrialRecord]:
    """The complete trials that no other complete one dominates, the best in the first objective first."""
    complete = [trial for trial in trials if trial.state == "complete"]
    front = [trial for trial in complete if not any(dominates(other.point, trial.point) for other in complete)]
    return sorted(front, key=lambda trial: (*(-value for value in trial.point.values()), trial.number))


def dominates(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether `one` is at least as high in every objective, and higher in some."""
    return all(one[key] >= value for key, value in other.items()) and one != other


def hypervolume(points: Iterable[Sequence[float]], origin: Sequence[float]) -> float:
    """What the points dominate above `origin`: a length for one objective, an area (dB²) for two.

    Zitzler and Thiele, IEEE Trans. Evol. Comp. 3(4), 1999; sliced along the last objective. Points that are not above
    the origin everywhere count nothing.
    """
    gains = [tuple(v - o for v, o in zip(point, origin, strict=True)) for point in points]
    return _volume(sorted((gain for gain in gains if min(gain) > 0), key=lambda gain: -gain[-1]))


def _volume(gains: Sequence[tuple[float, ...]]) -> float:
    """Above 0, of gains whose last entries fall."""
    if not gains or len(gains[0]) == 1:
        return gains[0][0] if gains else 0.0
    volume = 0.0
    for count, gain in enumerate(gains, 1):
        height = gain[-1] - (gains[count][-1] if count < len(gains) else 0.0)
        if height > 0:
            flat = sorted((each[:-1] for each in gains[:count]), key=lambda each: -each[-1])
            volume += height * _volume(flat)
    return volume


def hypervolume_after(record: SearchRecord) -> list[float]:
    """The hypervolume above the degraded images after each complete trial, in the order in which they ended."""
    ended = sorted(record.complete, key=lambda trial: (trial.ended is None, trial.ended, trial.number))
    points = [[trial.point[name] for name in record.objectives] for trial in ended]
    origin = [record.origin[name] for name in record.objectives] if points else []
    return [hypervolume(points[: count + 1], origin) for count in range(len(points))]


def chosen(record: SearchRecord) -> TrialRecord | None:
    """The member of the front with the highest score: the worse of its two gains over the degraded images."""
    front = pareto_front(record.trials)
    return max(front, key=lambda trial: trial.best[METRICS["score"]], default=None)


def reference(record: SearchRecord) -> TrialRecord | None:
    """What the others are compared with: the first known point."""
    return next((trial for trial in record.trials if trial.label), None)
