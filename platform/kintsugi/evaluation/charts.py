"""Curves of an evaluation as SVG to be set into an HTML page: readable on light and on dark ground."""

import re
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from typing import Any

import numpy as np

from kintsugi.evaluation.scorecard import ImageScore

INK = "#010203"
"""Stands for the colour of the page's text, which only the page knows."""
_BLUE, _ORANGE, _GREY = "#3b82f6", "#f59e0b", "#8a8a8a"
Draw = Callable[[Any], None]


def gain_chart(images: Sequence[ImageScore]) -> str:
    """How the aligned gains in PSNR and in defect PSNR are spread over the images."""

    def draw(axes: Any) -> None:
        for name, label, colour in (("aligned_psnr", "PSNR", _BLUE), ("aligned_defect_psnr", "defect PSNR", _ORANGE)):
            gains = [i.restored[name] - i.degraded[name] for i in images if name in i.restored and name in i.degraded]
            if gains:
                axes.hist(gains, bins="auto" if len(gains) > 10 else 10, alpha=0.55, color=colour, label=label)
        axes.axvline(0, color=INK, linewidth=1)
        axes.set(title="Gain over the degraded image", xlabel="dB, left of 0 is worse", ylabel="images")
        axes.legend()

    return svg(draw, "gain")


def pair_chart(images: Sequence[ImageScore]) -> str:
    """What is left of each defect against what was invented in its background: neither is bought with the other."""

    def draw(axes: Any) -> None:
        for side, colour in (("degraded", _GREY), ("restored", _BLUE)):
            figures = [getattr(image, side) for image in images]
            both = [f for f in figures if "contrast_kept" in f and "background_invented" in f]
            kept = np.clip([f["contrast_kept"] for f in both], -0.5, 1.5)
            axes.scatter(
                [100 * f["background_invented"] for f in both], kept, s=12, alpha=0.6, color=colour, label=side
            )
        axes.axhline(1, color=INK, linewidth=0.8, linestyle="--")
        axes.set(
            title="Kept against invented",
            xlabel="background invented, %",
            ylabel="defect contrast kept",
            ylim=(-0.6, 1.6),
        )
        axes.legend(loc="lower right")

    return svg(draw, "pair")


def precision_recall_chart(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """A detector's precision over its recall, pixel by pixel, on clean, degraded and restored images."""

    def draw(axes: Any) -> None:
        for name, colour in (("clean", INK), ("degraded", _GREY), ("restored", _BLUE)):
            points = np.array(curves.get(name) or np.zeros((0, 2)))
            axes.plot(points[:, 0], points[:, 1], color=colour, label=name, linewidth=1.6)
        axes.set(
            title="The detector", xlabel="recall of defect pixels", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02)
        )
        axes.legend()

    return svg(draw, "detector")


def svg(draw: Draw, name: str, size: tuple[float, float] = (4.6, 3.2)) -> str:
    """An `<svg>` element without any reference to the outside.

    Args:
        name: keeps its ids apart from other charts'.
        size: width and height in inches.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    style: Any = {
        **ink, "svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 9,
        "axes.titlesize": 10, "axes.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "grid.color": _GREY, "grid.alpha": 0.25, "legend.frameon": False,
    }  # fmt: skip
    target = StringIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        draw(figure.subplots())
        nothing: Any = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(target, metadata=nothing)
    text = target.getvalue()
    text = re.sub(r"\sxmlns(:\w+)?=\"[^\"]*\"", "", text[text.index("<svg") :])
    # Groups are numbered alike in every chart, and nothing refers to them.
    text = re.sub(r"<g id=\"[^\"]*\"", "<g", text)
    return re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL).replace(INK, "currentColor")
