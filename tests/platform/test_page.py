import base64

import numpy as np

from kintsugi import page
from kintsugi.imaging import decode


def test_a_picture_in_a_page_is_the_image_itself() -> None:
    unit = np.linspace(-0.2, 1.2, 48, dtype=np.float32).reshape(6, 8)
    head, data = page.uri(page.png(unit)).split(",")
    assert head == "data:image/png;base64"
    assert np.array_equal(decode(base64.b64decode(data)).pixels, np.rint(unit.clip(0, 1) * 255))


def test_colour_stays_colour_and_other_channels_become_grey() -> None:
    assert decode(page.png(np.zeros((4, 4, 3), np.float32))).channels == 3
    assert decode(page.png(np.zeros((4, 4, 5), np.float32))).channels == 1


def test_names_are_text_and_never_markup() -> None:
    assert "<b>x" not in page.tile("<b>x", "<b>x", "<b>x").replace("<b>&lt;", "")
    assert "&lt;i&gt;" in page.table(["<i>"], [["<small>cell</small>"]]) and "<small>cell" in page.table(
        [], [["<small>cell"]]
    )
