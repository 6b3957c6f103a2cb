import itertools
from pathlib import Path
from typing import Any

import pytest


def test_keys_alone_lead_from_the_first_file_to_the_download(tab: Any, served: Any, tmp_path: Path, part: Any) -> None:
    tab.restored(part(tmp_path))
    tab.value("document.activeElement.blur()")
    met: list[str] = []
    for _ in itertools.takewhile(lambda _: "download" not in met, range(60)):
        tab.press("Tab")
        met.append(
            tab.value("document.activeElement.id || document.activeElement.className || document.activeElement.name")
        )
        assert tab.value("document.activeElement.matches(':focus-visible')"), met[-1]
    for stop in (
        "file",
        "item",
        "remove",
        "mode",
        "zoom-in",
        "zoom-fit",
        "view",
        "seam",
        "hold",
        "black",
        "bright",
        "overlay",
        "download",
    ):
        assert stop in met
    assert tab.download("#download", tmp_path / "kept").read_bytes() == served.image


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_is_wider_than_the_screen(tab: Any, served: Any, tmp_path: Path, width: int, part: Any) -> None:
    tab.resize(width, 780, touch=width < 500)
    served.report = {"alarm": True, "reasons": ["x" * 200]}
    tab.restored(part(tmp_path, name="a-very-long-name-of-a-part-" * 4))
    tab.value("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert tab.value("document.documentElement.scrollWidth") <= width
    beyond = "e => !e.closest('.sr, #queue, .skip') && e.getBoundingClientRect().right > innerWidth + 1"
    outside = f"[...document.querySelectorAll('main *')].filter({beyond})"
    assert tab.value(f"{outside}.map(e => e.id || e.className || e.tagName)") == []


def test_targets_are_large_enough_for_a_finger(tab: Any, tmp_path: Path, part: Any) -> None:
    tab.resize(360, 780, touch=True)
    tab.restored(part(tmp_path))
    small = (
        "[...document.querySelectorAll('button, .button, select')].filter(e => e.offsetParent && e.offsetHeight < 44)"
    )
    assert tab.value(f"{small}.map(e => e.id || e.className)") == []


def test_two_fingers_zoom_and_one_moves_the_divider(tab: Any, tmp_path: Path, part: Any) -> None:
    tab.resize(360, 780, touch=True)
    tab.restored(part(tmp_path))
    tab.value("$('view').scrollIntoView()")
    left, top, width, height = tab.value("(b => [b.left, b.top, b.width, b.height])($('view').getBoundingClientRect())")
    middle = top + height / 2

    def touch(kind: str, *xs: float) -> None:
        points = [{"x": left + x * width, "y": middle, "id": i} for i, x in enumerate(xs)]
        tab.send("Input.dispatchTouchEvent", type=kind, touchPoints=points)

    for kind, xs in (("touchStart", [0.5]), ("touchMove", [0.55]), ("touchMove", [0.6]), ("touchEnd", [])):
        touch(kind, *xs)
    tab.settled()
    assert tab.value("view.split") > 0.6
    scale = tab.value("view.scale")
    for kind, xs in (
        ("touchStart", [0.3]),
        ("touchStart", [0.3, 0.7]),
        ("touchMove", [0.2, 0.8]),
        ("touchMove", [0.1, 0.9]),
        ("touchEnd", []),
    ):
        touch(kind, *xs)
    tab.settled()
    assert tab.value("view.scale") == pytest.approx(2 * scale, rel=0.1)


def test_dark_and_light_are_told_apart(tab: Any) -> None:
    colours = "(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))"
    tab.colours("light")
    light = tab.value(colours)
    tab.colours("dark")
    assert tab.value(colours) != light


def test_every_control_has_a_name_and_no_id_is_there_twice(tab: Any, tmp_path: Path, part: Any) -> None:
    tab.restored(part(tmp_path))
    nodes = tab.send("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "link", "slider", "checkbox", "radio", "combobox", "textbox", "spinbutton", "meter")
    unnamed = [
        n for n in nodes if not n["ignored"] and n["role"]["value"] in roles and not n.get("name", {}).get("value")
    ]
    assert unnamed == []
    ids = tab.value("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


def test_the_api_page_lists_every_route_with_its_fields(tab: Any, served: Any) -> None:
    tab.send("Page.navigate", url=served.url + "docs")
    tab.until("document.readyState === 'complete' && document.querySelectorAll('#routes section').length > 4")
    words = tab.text("main")
    for told in (
        "POST /v1/restore",
        "white_level",
        "application/octet-stream",
        "mask",
        "GET /v1/models",
        "JSON of the answer",
        "request_id",
        "Client(",
    ):
        assert told in words
    tab.resize(360, 780)
    assert tab.value("document.documentElement.scrollWidth") <= 360 and tab.complaints() == []
