from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kintsugi import imaging


@pytest.mark.parametrize("kind", ["tiff", "png"])
def test_a_pixel_is_read_with_its_value_of_16_bits(
    tab: Any, served: Any, tmp_path: Path, kind: imaging.Format, part: Any
) -> None:
    tab.restored(part(tmp_path, kind))
    before, after = served.pixels
    tab.value("$('view').focus()")
    tab.press("+", 5)
    tab.press("ArrowRight", 3)
    tab.press("ArrowDown", 2)
    x, y = tab.value("[view.cursor.x, view.cursor.y]")
    told = tab.text("#readout").split()
    assert told[:7] == ["x", str(x), "y", str(y), str(before[y, x]), "→", str(after[y, x])]
    box = tab.value("(b => [b.left, b.top])($('view').getBoundingClientRect())")
    left, top = tab.value("[view.origin.x + 20.5 * view.scale, view.origin.y + 7.5 * view.scale]")
    tab.mouse("mouseMoved", box[0] + left, box[1] + top)
    tab.settled()
    assert tab.text("#readout").startswith(f"x 20  y 7  {before[7, 20]} → {after[7, 20]}")


def test_a_zoomed_pixel_is_one_square_with_its_own_grey(tab: Any, served: Any, tmp_path: Path, part: Any) -> None:
    tab.restored(part(tmp_path))
    tab.value("view.set({scale: 64, split: 1})")
    tab.settled()
    x, y = tab.value("[Math.floor(view.x), Math.floor(view.y)]")
    colours = tab.value(
        "((o, s) => [...new Uint32Array(view.context.getImageData(o.x + s * Math.floor(view.x), "
        "o.y + s * Math.floor(view.y), s, s).data.buffer)])(view.origin, 64)"
    )
    level = round(float(served.pixels[0][y, x]) / 4095 * 255)
    assert {colour & 255 for colour in colours} <= {level, level - 1, level + 1} and len(set(colours)) == 1


def test_the_divider_moves_by_keys_and_shows_more_of_the_original(tab: Any, tmp_path: Path, part: Any) -> None:
    tab.restored(part(tmp_path))
    seam = "document.querySelector('#seam').getAttribute('aria-valuenow')"
    assert tab.value(seam) == "50"
    middle = tab.painting()
    tab.value("$('seam').focus()")
    tab.press("ArrowRight", 5)
    assert tab.value(seam) == "55" and tab.painting() != middle
    tab.press("ArrowLeft", 5)
    assert tab.value(seam) == "50" and tab.painting() == middle
    tab.press("End")
    assert tab.value(seam) == "100"
    tab.press("Home")
    assert tab.value(seam) == "0"


def test_the_divider_is_dragged_and_elsewhere_the_image_is(tab: Any, tmp_path: Path, part: Any) -> None:
    tab.restored(part(tmp_path))
    tab.click("#zoom-fit")
    left, top, width, height = tab.value("(b => [b.left, b.top, b.width, b.height])($('view').getBoundingClientRect())")
    drag = {"button": "left", "buttons": 1}
    for kind, x in (("mousePressed", 0.5), ("mouseMoved", 0.6), ("mouseReleased", 0.6)):
        tab.mouse(kind, left + x * width, top + height / 2, clickCount=1, **drag)
    tab.settled()
    moved = tab.value("view.split")
    assert moved > 0.5 and tab.value("view.x") == 80 / 2
    tab.value("view.zoomTo(32)")
    for kind, x in (("mousePressed", 0.2), ("mouseMoved", 0.1), ("mouseReleased", 0.1)):
        tab.mouse(kind, left + x * width, top + height / 2, clickCount=1, **drag)
    tab.settled()
    assert tab.value("view.split") == moved and tab.value("view.x") > 80 / 2


def test_zoom_keeps_the_pixel_under_the_wheel_and_goes_by_keys(tab: Any, tmp_path: Path, part: Any) -> None:
    tab.restored(part(tmp_path))
    assert tab.text("#zoom-told") == "100 %"
    left, top, width, height = tab.value("(b => [b.left, b.top, b.width, b.height])($('view').getBoundingClientRect())")
    tab.click("#zoom-fit")
    x, y = left + width * 0.45, top + height * 0.3
    tab.mouse("mouseMoved", x, y)
    tab.settled()
    before = tab.value("view.cursor")
    tab.mouse("mouseWheel", x, y, deltaX=0, deltaY=-600)
    tab.until("view.scale > 1.5 * view.fitting")
    tab.mouse("mouseMoved", x + 0.01, y)
    tab.settled()
    assert tab.value("view.cursor") == before
    tab.value("$('view').focus()")
    for key, told in (("1", "100 %"), ("+", "200 %"), ("+", "300 %"), ("-", "200 %")):
        tab.press(key)
        assert tab.text("#zoom-told") == told
    tab.press("0")
    assert tab.value("view.scale === view.fitting")


def test_space_held_shows_the_original(tab: Any, tmp_path: Path, part: Any) -> None:
    tab.restored(part(tmp_path))
    tab.click("[value=blink]")
    restored = tab.painting()
    tab.value("$('view').focus()")
    tab.press(" ", hold=True)
    assert tab.painting() != restored and tab.text("#label-left") == "original"
    tab.release(" ")
    assert tab.painting() == restored


def test_side_by_side_and_difference_show_both(tab: Any, served: Any, tmp_path: Path, part: Any) -> None:
    tab.restored(part(tmp_path))
    paintings = [tab.painting()]
    for mode in ("side", "difference", "blink"):
        tab.click(f"[value={mode}]")
        paintings.append(tab.painting())
    assert len(set(paintings)) == 4
    before, after = served.pixels
    y, x = np.argwhere(after.astype(int) - before > 1200)[0]
    tab.click("[value=difference]")
    at = f"view.origin.x + {x} * view.scale, view.origin.y + {y} * view.scale, 1, 1"
    assert tab.value(f"[...view.context.getImageData({at}).data]") == [255, 196, 84, 255]


def test_the_defect_map_is_laid_over_and_taken_away(tab: Any, tmp_path: Path, part: Any) -> None:
    tab.restored(part(tmp_path))
    plain = tab.painting()
    tab.click("#overlay")
    marked = tab.painting()
    tab.value("$('opacity').value = 10; $('opacity').dispatchEvent(new Event('input'))")
    tab.settled()
    assert len({plain, marked, tab.painting()}) == 3
    tab.value("$('view').focus()")
    tab.press("d")
    assert tab.painting() == plain


def test_an_image_of_12_bits_in_16_is_not_black_and_black_and_white_can_be_set(
    tab: Any, tmp_path: Path, part: Any
) -> None:
    tab.restored(part(tmp_path, "tiff"))
    assert tab.value("[view.window.black, view.window.white]") == [0, 4095]
    assert "the camera's white level may be 4095" in tab.text("#view-note")
    seen = tab.painting()
    tab.click("#window-full")
    assert tab.value("view.window.white") == 65535 and tab.painting() != seen
    tab.click("#window-fit")
    assert tab.value("view.window.white") <= 4095
    tab.value("$('black-value').value = 1000; $('black-value').dispatchEvent(new Event('change'))")
    assert tab.value("[view.window.black, Number($('black').value)]") == [1000, 1000]


def test_at_one_to_one_every_value_has_its_own_grey(tab: Any, served: Any, tmp_path: Path, part: Any) -> None:
    tab.restored(part(tmp_path, "tiff"))
    tab.value("view.set({split: 0})")
    tab.settled()
    data = "view.context.getImageData(view.origin.x, view.origin.y, 80, 60).data"
    seen = np.array(tab.value(f"[...{data}].filter((_, i) => i % 4 === 0)")).reshape(60, 80)
    wanted = served.pixels[1] / 4095 * 255
    assert np.abs(seen - wanted)[:, 2:].max() <= 0.51
