"""Pieces of an HTML page that needs nothing else: style, tables, pictures inside the file."""

import base64
import html
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kintsugi.imaging import Image, encode

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #808080; --good: #15803d; --bad: #b91c1c; --box: #8881; }
@media (prefers-color-scheme: dark) { :root { --good: #4ade80; --bad: #f87171; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .4rem; }
p { margin: .3rem 0 .8rem; max-width: 60rem; } .soft, small { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); gap: .7rem; }
.tile { background: var(--box); border-radius: 8px; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; } .tile small { display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92em; }
th, td { text-align: right; padding: .25rem .55rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; } th:first-child, td:first-child { text-align: left; }
.up { color: var(--good); } .down { color: var(--bad); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }
.charts svg { width: 100%; height: auto; } img { max-width: 100%; border-radius: 4px; display: block; }
.chart { background: #fff; padding: .5rem; }
.strip { border-top: 1px solid var(--line); padding: .8rem 0; display: block; cursor: zoom-in; }
.strip input { position: absolute; opacity: 0; } .strip input:focus-visible + div { outline: 2px solid; }
.cells { display: grid; grid-template-columns: repeat(5, 1fr); gap: .5rem; margin-top: .4rem; }
.cells figure { margin: 0; } .cells img { width: 100%; } figcaption { font-size: .8em; color: var(--soft); }
.strip input:checked ~ .cells { grid-template-columns: repeat(2, 1fr); } summary { cursor: pointer; margin: 1rem 0; }
"""


def document(title: str, body: Iterable[str], style: str = "") -> str:
    """A whole page; `style` comes after the common one."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{text(title)}</title><style>{STYLE}{style}</style></head><body><h1>{text(title)}</h1>",
        *body,
        "</body></html>\n",
    ]
    return "\n".join(parts)


def tile(title: str, value: str, told: str) -> str:
    """A figure in a box with what is to be said of it."""
    return f'<div class="tile">{text(title)}<b>{text(value)}</b><small>{text(told)}</small></div>'


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; cells are HTML already."""
    head = "".join(f"<th>{text(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def strip(told: str, figures: Iterable[str]) -> str:
    """Pictures side by side that a click enlarges; `told` and `figures` are HTML already."""
    return (
        f'<label class="strip"><input type="checkbox"><div>{told}</div>'
        f'<div class="cells">{"".join(figures)}</div></label>'
    )


def captioned(caption: str, pixels: Any, attributes: str = "") -> str:
    """A picture of an image in [0, 1] over its caption."""
    return (
        f'<figure{attributes}><img alt="{text(caption)}" src="{uri(png(pixels))}">'
        f"<figcaption>{text(caption)}</figcaption></figure>"
    )


def text(raw: str) -> str:
    """Text as HTML."""
    return html.escape(raw)


def png(pixels: Any) -> bytes:
    """PNG bytes of an image in [0, 1]; grey stays grey, which is a third of the size."""
    unit = pixels if pixels.ndim == 2 or pixels.shape[2] == 3 else pixels.mean(axis=2)
    return encode(Image(np.rint(np.clip(unit, 0, 1) * 255).astype(np.uint8), "png", 255))


def uri(data: bytes) -> str:
    """PNG bytes as the address of a picture."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
