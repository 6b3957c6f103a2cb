from pathlib import Path

import numpy as np

from kintsugi.pictures import as_rgb, mosaic, overlay, picture_grid


def test_a_grid_is_a_picture_of_its_images(tmp_path: Path) -> None:
    images = [np.zeros((30, 40), np.float32), np.full((30, 40, 3), 65535, np.uint16)]
    path = picture_grid([images, images], ["dark", "bright"], ["one", "two"], tmp_path / "new" / "grid.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    wider = picture_grid([images * 2], ["a", "b", "c", "d"], [], tmp_path / "wide.png")
    width = [int.from_bytes(file.read_bytes()[16:20], "big") for file in (path, wider)]
    assert width[1] > 1.5 * width[0]


def test_the_same_grid_is_the_same_bytes(tmp_path: Path) -> None:
    image = np.random.default_rng(0).random((20, 20), np.float32)
    one, two = (picture_grid([[image]], ["x"], ["y"], tmp_path / name, captions=[["z"]]).read_bytes() for name in "ab")
    assert one == two
    other = picture_grid([[1 - image]], ["x"], ["y"], tmp_path / "c", captions=[["z"]]).read_bytes()
    assert other != one


def test_rows_of_different_length_and_images_of_different_size_fit_in_one_grid(tmp_path: Path) -> None:
    rows = [[np.zeros((20, 90), np.uint8), np.ones((90, 20), np.bool_)], [np.zeros((5, 5), np.uint16)]]
    assert picture_grid(rows, [], [], tmp_path / "grid.png").stat().st_size > 0


def test_an_outline_runs_around_the_mask_and_leaves_the_defect_as_it_was() -> None:
    image = np.random.default_rng(0).random((60, 60), np.float32)
    mask = np.zeros((60, 60), np.bool_)
    mask[20:30, 25:40] = True
    drawn = overlay(image, mask)
    changed = (drawn != as_rgb(image)).any(axis=2)
    assert not changed[mask].any(), "the defect is drawn upon"
    assert not changed[19, 25:40].any() and changed[18, 25:40].all(), "one pixel stays free beside the defect"
    rows, columns = np.nonzero(changed)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (18, 31, 23, 41)


def test_no_mask_no_outline_and_the_image_given_is_not_drawn_upon() -> None:
    image = np.full((10, 10, 3), 0.25, np.float32)
    assert np.array_equal(overlay(image, np.zeros((10, 10), np.bool_)), image)
    overlay(image, np.eye(10, dtype=np.bool_))
    assert (image == 0.25).all()


def test_integers_are_scaled_by_the_range_of_their_type() -> None:
    assert as_rgb(np.full((2, 2), 255, np.uint8)).max() == as_rgb(np.full((2, 2), 65535, np.uint16)).max() == 1
    assert as_rgb(np.eye(2, dtype=np.bool_)).shape == (2, 2, 3)


def test_a_mosaic_shows_every_pixel_as_it_is_on_white() -> None:
    grey = np.full((2, 3), 0.5, np.float32)
    colour = np.zeros((4, 2, 3), np.uint16)
    colour[..., 0] = 65535
    sheet = mosaic([[grey, colour], [grey]], gap=1)
    assert sheet.shape == (4 + 1 + 2, 3 + 1 + 2, 3)
    assert (sheet[:2, :3] == 128).all() and (sheet[:4, 4:] == (255, 0, 0)).all() and (sheet[5:, :3] == 128).all()
    assert (sheet[2:4, :3] == 255).all() and (sheet[:, 3] == 255).all() and (sheet[5:, 4:] == 255).all()
