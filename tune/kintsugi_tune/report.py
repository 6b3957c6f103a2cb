"""A search for people: one HTML file that needs nothing else."""

from collections import Counter
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path

from kintsugi.data.dataset import resolve_dataset
from kintsugi.errors import KintsugiError
from kintsugi.evaluation.charts import INK
from kintsugi.evaluation.report import SHOWN, gain_cell
from kintsugi.evaluation.scorecard import Figure, Scorecard, figures
from kintsugi.page import captioned, document, strip, table, text, tile
from kintsugi.storage import ObjectStore, write_atomically
from kintsugi_tune.charts import correlation_chart, curve_charts, followed, hypervolume_chart, importance_chart
from kintsugi_tune.front import chosen, hypervolume_after, pareto_front, reference
from kintsugi_tune.influence import ENOUGH
from kintsugi_tune.looked import SIDE, Looked, look
from kintsugi_tune.plots import STATES, front_plot, mark_shape, origin_shape, out_of_sight, parallel_plot, ramp
from kintsugi_tune.record import METRICS, SearchRecord, TrialRecord
from kintsugi_tune.values import UNITS, trial_told, values_told

_COMPARED = (
    "aligned_psnr", "aligned_ssim", "aligned_defect_psnr", "aligned_defect_ssim", "contrast_kept",
    "background_invented",
)  # fmt: skip
_FEW = 20
Links = Mapping[int, str]
Colours = Mapping[int, str]


def write_report(record: SearchRecord, store: ObjectStore, path: Path, *, images: int = 6, scored: int = 60) -> Path:
    """Write what a search found, with pictures of the `images` worst validation images of the chosen member.

    `scored` validation images, evenly over the split, are restored with the checkpoints of the chosen member and of the
    reference, the worst also with those of other members of the front. What of these the store does not hold is named
    on the page instead. The file refers to nothing outside.
    """
    looked = look(record, store, images, scored)
    pictured = {picture.trial for _, pictures in looked.strips for picture in pictures}
    links = {t.number: f"#{'pictures' if t.number in pictured else 'trial'}-{t.number}" for t in record.trials}
    shown = followed(record)
    colours = {number: colour.replace(INK, "currentColor") for number, (_, colour) in shown.items()}
    body = [
        *_lead(record, store),
        *_tiles(record),
        *_front(record, colours, links),
        *_compared(record, looked),
        *_pictures(record, looked),
        *_progress(record),
        *_influence(record),
        *_parallel(record, links),
        *_curves(record, shown, colours),
        *_trials(record),
        f"<script>{_asset('report.js')}</script>",
    ]
    write_atomically(path, document(f"Search {record.name}", body, _asset("report.css")).encode())
    return path


def _asset(name: str) -> str:
    return (resources.files("kintsugi_tune") / "page" / name).read_text(encoding="utf-8")


def _lead(record: SearchRecord, store: ObjectStore) -> Iterator[str]:
    counts = Counter(trial.state for trial in record.trials)
    states = ", ".join(f"{counts[state]} {told}" for state, told in STATES.items() if counts[state])
    spent, full = sum(trial.epochs for trial in record.trials), len(record.trials) * record.config.search.epochs
    share = f", {spent / full:.0%} of the {full} that {len(record.trials)} full trials take" if full else ""
    yield f'<p class="soft">Dataset {text(_dataset(record, store))}. {len(record.trials)} trials: {states or "none"}. '
    yield f"{spent} epochs were trained{share}. Figures are means over the validation images in dB, each image after "
    yield "one global intensity fit to the clean image; the defect PSNR is over labelled defects only.</p>"
    if not record.complete:
        yield "<p><b>No trial is complete yet</b>: there is no front, and nothing to choose from.</p>"


def _dataset(record: SearchRecord, store: ObjectStore) -> str:
    name, _, digest = record.config.data.dataset.partition("@")
    try:
        prefix, _ = resolve_dataset(store, record.config.data.dataset)
        digest = prefix.rpartition("/")[2]
    except KintsugiError:
        return f"{record.config.data.dataset}, which is not in the store any more"
    return f"{name}, digest {digest[:12]}"


def _tiles(record: SearchRecord) -> Iterator[str]:
    best, base = chosen(record), reference(record)
    if best is None:
        return
    yield '<div class="tiles">'
    yield tile("chosen", f"trial {trial_told(best)}", "of the front the highest score")
    yield tile("score", f"{best.best['score']:+.2f} dB", "the smaller of the gains in PSNR and in defect PSNR")
    for name in record.objectives:
        if name != "score":
            yield tile(UNITS[name], f"{best.point[name]:.2f}", _over(record, best, base, name))
    members = len(pareto_front(record.trials))
    yield tile("on the front", str(members), f"of {len(record.complete)} complete trials")
    yield f'</div><p class="soft">Its values: {text("; ".join(values_told(best)))}.</p>'


def _over(record: SearchRecord, best: TrialRecord, base: TrialRecord | None, name: str) -> str:
    words = [f"{best.point[name] - record.origin[name]:+.2f} over degraded"] if name in record.origin else []
    if base is not None and name in base.point and base.number != best.number:
        words.append(f"{best.point[name] - base.point[name]:+.2f} over {base.label}")
    return ", ".join(words)


def _front(record: SearchRecord, colours: Colours, links: Links) -> Iterator[str]:
    plot = front_plot(record, colours, links)
    if not plot:
        return
    if len(record.objectives) > 1:
        yield "<h2>Pareto front</h2><p>No complete trial is at least as good as a member in every objective and better "
        yield "in one."
    else:
        yield "<h2>What each trial reached</h2><p>The line is the best of the complete trials."
    yield "Point at a mark, or tab to it, for its values; click for its pictures, or else its row below.</p>"
    yield plot
    kinds = {
        mark_shape("member"): "on the front",
        mark_shape("other"): "complete",
        mark_shape("known"): "known point",
        '<circle class="best"/>': "chosen",
        mark_shape("open"): "not complete: its last figures",
        origin_shape(): "degraded images",
    }
    keys = (
        f'<span><svg viewBox="-12 -12 24 24" class="point">{shape}</svg>{told}</span>' for shape, told in kinds.items()
    )
    yield f'<div class="key">{"".join(keys)}</div>'
    if away := out_of_sight(record):
        yield f'<p class="soft">Too far off to be shown in its place: {text("; ".join(away))}.</p>'
    if len(record.objectives) > 2:
        yield '<p class="soft">The front is that of all objectives; the plot shows the first two.</p>'


def _compared(record: SearchRecord, looked: Looked) -> Iterator[str]:
    best, base = chosen(record), reference(record)
    if best is None:
        return
    yield f"<h2>Chosen against {text(base.label or '') if base else 'a known point'}</h2>"
    if base is None or base.state != "complete":
        yield '<p class="soft">No known point is complete that it could be compared with.</p>'
    elif base.number == best.number:
        yield f'<p class="soft">Nothing was found that is better: the chosen trial is {text(base.label or "")}.</p>'
    elif best.number in looked.cards and base.number in looked.cards:
        yield from _comparison(looked.cards[best.number], looked.cards[base.number], trial_told(best), base.label or "")
    else:
        yield '<p class="soft">A checkpoint is missing, see below.</p>'


def _comparison(best: Scorecard, base: Scorecard, told: str, label: str) -> Iterator[str]:
    others = {image.sample_id: image.restored for image in base.images}
    paired = figures([image.model_copy(update={"degraded": others[image.sample_id]}) for image in best.images])
    rows = [_row(name, paired[name], best) for name in _COMPARED if name in paired]
    parts = len({image.part_id for image in best.images})
    yield table(["mean over images", "degraded", label, f"trial {told}", "difference", "images"], rows)
    yield "<p><small>Both restored the same validation images. In brackets 95% of paired bootstrap draws over the "
    yield f"{parts} parts. The search chose by these images, so the difference flatters the chosen: judge it on the "
    yield "test split before you trust it. Less is better for background invented.</small></p>"


def _row(name: str, paired: Figure, best: Scorecard) -> list[str]:
    """`paired` has the reference in place of the degraded image."""
    show = SHOWN[name]
    degraded = show(best.overall[name].degraded) if name in best.overall else ""
    change = gain_cell(name, paired)
    return [show.title, degraded, show(paired.degraded), show(paired.restored), change, str(paired.count)]


def _pictures(record: SearchRecord, looked: Looked) -> Iterator[str]:
    if not record.complete:
        return
    yield "<h2>Before and after</h2>"
    for what, reason in looked.missing.items():
        yield f'<p class="down">Without {text(what)}: {text(reason)}</p>'
    if not looked.strips:
        yield '<p class="soft">There is nothing to show.</p>'
        return
    yield f"<p>The {len(looked.strips)} validation images on which {text(_first(record, looked))} gains least: the "
    yield "smaller of the gains in PSNR and in defect PSNR. Each "
    yield f"is shown after the intensity fit, large ones in a window of {SIDE} px around the defect at native "
    yield "resolution. Click on a strip to enlarge it.</p>"
    seen: set[int] = set()
    for told, pictures in looked.strips:
        cells: list[str] = []
        for picture in pictures:
            number = picture.trial
            mark = "" if number is None else f' data-trial="{number}"'
            mark += "" if number is None or number in seen else f' id="pictures-{number}"'
            seen |= set() if number is None else {number}
            cells.append(captioned(picture.caption, picture.pixels, mark))
        yield strip(told, cells)


def _first(record: SearchRecord, looked: Looked) -> str:
    number = next(iter(looked.cards))
    return f"trial {next(trial_told(trial) for trial in record.trials if trial.number == number)}"


def _progress(record: SearchRecord) -> Iterator[str]:
    if record.complete:
        yield "<h2>How the front grew</h2><p>What the front dominates above the degraded images, "
        yield f"{hypervolume_after(record)[-1]:.2f} in the end.</p>"
        yield f'<div class="charts one">{hypervolume_chart(record)}</div>'


def _influence(record: SearchRecord) -> Iterator[str]:
    count = len(record.complete)
    yield "<h2>What matters</h2>"
    drawn = [chart for chart in (importance_chart(record), correlation_chart(record)) if chart]
    if count < ENOUGH or not drawn:
        yield f'<p class="soft">That cannot be told from {count} complete trials: it takes at least {ENOUGH} that '
        yield "differ.</p>"
        return
    yield "<p>Importance: how much the best quarter of the trials differs in a coordinate from all of them (PED-ANOVA, "
    yield "Watanabe et al., IJCAI 2023). Shares that sum to 1 are sampled one after the other: ‘a | b, c’ is a's "
    yield "share in what b and c leave; the last takes the rest and has no coordinate. Direction: Spearman's rank "
    yield "correlation with each real value, where it is a number."
    yield f" From {count} trials these are hints, no more.</p>" if count < _FEW else "</p>"
    yield f'<div class="charts wide">{"".join(drawn)}</div>'


def _parallel(record: SearchRecord, links: Links) -> Iterator[str]:
    plot = parallel_plot(record, links)
    if not plot:
        return
    who = "complete trial, thick for the front" if record.complete else "trial so far"
    yield f"<h2>All values</h2><p>A line for each {who}; point at one to follow it.</p>"
    steps = ", ".join(ramp(share) for share in (0, 0.5, 1))
    yield f'<div class="key"><span>score: worst <i class="ramp" style="background: linear-gradient(90deg, {steps})">'
    yield f"</i> best, by rank</span></div>{plot}"


def _curves(record: SearchRecord, shown: Mapping[int, tuple[TrialRecord, str]], colours: Colours) -> Iterator[str]:
    if not shown:
        return
    who = "the front and the first known point" if record.complete else "the trials with the highest scores"
    yield f"<h2>Curves</h2><p>Epoch by epoch, of {who}. Loss terms are without their weights, so that trials can be "
    yield "compared; the total is with them, so that it cannot.</p>"
    keys = (
        f'<span><i style="background: {colours[number]}"></i>{text(trial_told(trial))}</span>'
        for number, (trial, _) in shown.items()
    )
    yield f'<div class="key">{"".join(keys)}</div><div class="charts">{"".join(curve_charts(shown))}</div>'


def _trials(record: SearchRecord) -> Iterator[str]:
    front = {trial.number for trial in pareto_front(record.trials)}
    names = list(dict.fromkeys((*record.objectives, "score")))
    rows = [
        [
            f'<span id="trial-{trial.number}" data-trial="{trial.number}">{trial.number}</span>',
            text(trial.label or ""),
            STATES[trial.state] + (", on the front" if trial.number in front else ""),
            str(trial.epochs),
            *(_figure(trial, name) for name in names),
            f'<div class="told">{text("; ".join(values_told(trial)))}</div>',
            f'<div class="told short">{text(trial.reason or "")}</div>',
            text(trial.run),
        ]
        for trial in record.trials
    ]
    yield "<h2>All trials</h2><p>Figures of the epoch with the highest score.</p>"
    titles = [UNITS[name] for name in names]
    yield table(["trial", "known as", "state", "epochs", *titles, "values", "why it failed", "run"], rows)


def _figure(trial: TrialRecord, name: str) -> str:
    value = trial.point.get(name, trial.best.get(METRICS[name]))
    return "" if value is None else f"{value:.2f}"
