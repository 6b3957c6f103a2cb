from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kintsugi.data.layouts import BadPair, read_layout
from kintsugi.data.sample import RawSample, decode_sample
from kintsugi.errors import DataError
from kintsugi.imaging import Image, convert

Write = Callable[[str, Image | np.ndarray | bytes], None]
Picture = Callable[..., Image]
EMPTY = np.zeros((24, 32), np.bool_)


def read(name: str, folder: Path) -> tuple[dict[str, RawSample], dict[str, str]]:
    good, bad = {}, {}
    for item in read_layout(name, folder):
        if isinstance(item, BadPair):
            bad[item.name] = item.reason
        else:
            good[item.sample_id] = item
    return good, bad


def write_kla(write: Write, picture: Picture, spot: np.ndarray, split: str, name: str) -> None:
    root, defect, number = f"bottle/{split}", *name.split("/")
    write(f"{root}/GT_clean_image/{defect}/{number}.png", picture(1, colour=True))
    write(f"{root}/Degraded_image/{defect}/{number}.png", picture(2, colour=True))
    write(f"{root}/Defect_mask/{defect}/{number}_mask.png", spot)


def test_kla_gives_split_category_defect_and_bytes_as_they_were(
    tmp_path: Path, write: Write, picture: Picture, spot: np.ndarray
) -> None:
    write_kla(write, picture, spot, "Train", "broken_large/000")
    write_kla(write, picture, spot, "Val", "broken_large/000")
    good, bad = read("kla", tmp_path)
    assert not bad
    sample = good["bottle/Train/broken_large/000"]
    assert (sample.category, sample.defect_type, sample.split) == ("bottle", "broken_large", "train")
    assert good["bottle/Val/broken_large/000"].split == "val"
    assert len({raw.part_id for raw in good.values()}) == 2
    assert sample.clean == (tmp_path / "bottle/Train/GT_clean_image/broken_large/000.png").read_bytes()


def test_kla_names_every_image_that_lost_its_partner(
    tmp_path: Path, write: Write, picture: Picture, spot: np.ndarray
) -> None:
    for number in range(4):
        write_kla(write, picture, spot, "Train", f"hole/00{number}")
    root = tmp_path / "bottle/Train"
    (root / "GT_clean_image/hole/000.png").unlink()
    (root / "Degraded_image/hole/001.png").unlink()
    (root / "Defect_mask/hole/002_mask.png").unlink()
    good, bad = read("kla", tmp_path)
    assert list(good) == ["bottle/Train/hole/003"]
    assert bad == {
        "bottle/Train/hole/000": "its degraded and mask image has no clean partner",
        "bottle/Train/hole/001": "it has no degraded image",
        "bottle/Train/hole/002": "it has no mask",
    }


def test_kla_does_not_pass_over_a_split_whose_clean_folder_is_gone(
    tmp_path: Path, write: Write, picture: Picture, spot: np.ndarray
) -> None:
    write_kla(write, picture, spot, "Train", "hole/000")
    write("bottle/Val/Degraded_image/hole/000.png", picture(3))
    assert "bottle/Val/hole/000" in read("kla", tmp_path)[1]


def test_magnetic_tile_pairs_the_jpeg_with_the_png_beside_it(
    tmp_path: Path, write: Write, picture: Picture, spot: np.ndarray
) -> None:
    for name in ("MT_Crack/Imgs/exp1_num_1", "MT_Free/Imgs/exp1_num_2", "MT_Fray/Imgs/exp1_num_3"):
        write(f"{name}.jpg", convert(picture(1), "jpeg"))
    write("MT_Crack/Imgs/exp1_num_1.png", spot)
    write("MT_Crack/Imgs/exp1_num_9.png", spot)
    good, bad = read("magnetic-tile", tmp_path)
    assert {name: raw.defect_type for name, raw in good.items()} == {
        "MT_Crack/exp1_num_1": "crack",
        "MT_Free/exp1_num_2": "good",
    }
    assert bad == {
        "MT_Crack/exp1_num_9": "its mask image has no clean partner",
        "MT_Fray/exp1_num_3": "it has no mask",
    }


def test_pairs_join_by_name_across_endings_and_subfolders(
    tmp_path: Path, write: Write, picture: Picture, spot: np.ndarray
) -> None:
    write("clean/line1/a.tif", convert(picture(1, bits=16), "tiff"))
    write("degraded/line1/a.png", picture(2, bits=16))
    write("mask/line1/a_mask.bmp", spot)
    good, bad = read("pairs", tmp_path)
    assert not bad
    sample = decode_sample(good["line1/a"])
    assert sample.category == "line1" and sample.defect_type == "defect" and sample.mask.sum() == 20
    assert sample.degraded is not None and sample.degraded.bit_depth == sample.clean.bit_depth == 16


def test_the_manifest_of_pairs_gives_part_category_defect_split_and_white_level(
    tmp_path: Path, write: Write, picture: Picture, spot: np.ndarray
) -> None:
    write("clean/a.png", picture(1, bits=12))
    write("mask/a.png", spot)
    (tmp_path / "manifest.csv").write_text(
        "name,group,category,defect_type,split,white_level\na.png,g7,Steel,Crack,val,4095\n"
    )
    raw = read("pairs", tmp_path)[0]["a"]
    assert (raw.part_id, raw.category, raw.defect_type, raw.split) == ("g7", "Steel", "crack", "val")
    assert raw.white_level == 4095


def test_the_manifest_of_pairs_names_the_preset_of_a_degraded_image_that_is_there(
    tmp_path: Path, write: Write, picture: Picture
) -> None:
    for split, name in (("val", "a"), ("val", "b"), ("train", "c")):
        write(f"{split}/clean/{name}.png", picture(1))
        if split == "val":
            write(f"{split}/degraded/{name}.png", picture(2))
    (tmp_path / "manifest.csv").write_text("name,split,preset\na,val,lowlight\nb,val,\nc,train,kla\n")
    found = read("pairs", tmp_path)[0]
    assert {name: decode_sample(raw).preset for name, raw in found.items()} == {"a": "lowlight", "b": None, "c": None}


def test_a_category_names_the_defect_only_where_it_names_the_good_images_too(
    tmp_path: Path, write: Write, picture: Picture, spot: np.ndarray
) -> None:
    for name, mask in (("a", spot), ("b", EMPTY)):
        write(f"clean/{name}.png", picture(1))
        write(f"mask/{name}.png", mask)
    (tmp_path / "manifest.csv").write_text("name,category\na,Crack\nb,Free\n")
    assert [raw.defect_type for raw in read("pairs", tmp_path)[0].values()] == ["crack", "good"]
    (tmp_path / "manifest.csv").write_text("name,category\na,bottle\nb,bottle\n")
    assert [raw.defect_type for raw in read("pairs", tmp_path)[0].values()] == ["defect", "good"]


def test_an_image_that_nobody_vouches_for_is_unlabelled(tmp_path: Path, write: Write, picture: Picture) -> None:
    write("clean/a.png", picture(1))
    write("mask/a.png", EMPTY)
    (tmp_path / "manifest.csv").write_text("name,category,role\na,Free,unlabelled\n")
    assert read("pairs", tmp_path)[0]["a"].defect_type == "unlabelled"


def test_a_lost_mask_is_no_proof_of_a_good_part(
    tmp_path: Path, write: Write, picture: Picture, spot: np.ndarray
) -> None:
    for name in "abc":
        write(f"clean/{name}.png", picture(1))
    write("mask/a.png", spot)
    (tmp_path / "manifest.csv").write_text("name,defect_type\na,crack\nb,good\nc,crack\n")
    good, bad = read("pairs", tmp_path)
    assert set(good) == {"a", "b"} and bad == {"c": "it has no mask"}
    (tmp_path / "manifest.csv").unlink()
    assert set(read("pairs", tmp_path)[1]) == {"b", "c"}


def test_pairs_without_a_mask_folder_are_unlabelled(tmp_path: Path, write: Write, picture: Picture) -> None:
    write("clean/a.png", picture(1))
    raw = read("pairs", tmp_path)[0]["a"]
    assert raw.defect_type == "unlabelled" and raw.mask is None


def test_split_folders_fix_the_split_and_may_lack_degraded_images(
    tmp_path: Path, write: Write, picture: Picture
) -> None:
    write("train/clean/a.png", picture(1))
    write("val/clean/b.png", picture(2))
    write("val/degraded/b.png", picture(3))
    good, bad = read("pairs", tmp_path)
    assert not bad and {name: raw.split for name, raw in good.items()} == {"a": "train", "b": "val"}
    (tmp_path / "manifest.csv").write_text("name,split\na,val\nb,val\n")
    assert read("pairs", tmp_path)[1] == {"a": "manifest.csv puts it into val but its file lies in train/"}


def test_pairs_name_what_cannot_be_used_and_go_on(
    tmp_path: Path, write: Write, picture: Picture, spot: np.ndarray
) -> None:
    for name in ("fine", "small-mask", "torn", "twice", "deep"):
        write(f"clean/{name}.png", picture(1))
        write(f"degraded/{name}.png", picture(2))
        write(f"mask/{name}.png", spot)
    write("mask/small-mask.png", spot[:10])
    write("clean/torn.png", (tmp_path / "clean/torn.png").read_bytes()[:300])
    write("clean/twice.bmp", convert(picture(1), "bmp"))
    write("degraded/deep.png", picture(2, bits=16))
    write("mask/orphan.png", spot)
    write("degraded/orphan2.png", picture(3))
    write("clean/readme.txt", b"not an image")
    write("clean/.DS_Store", b"nothing")
    good, bad = read("pairs", tmp_path)
    assert set(good) == {"fine"}
    assert set(bad) == {"small-mask", "torn", "twice", "deep", "orphan", "orphan2", "readme.txt"}
    assert bad["twice"] == "several clean images share the name: twice.bmp, twice.png"
    assert bad["orphan"] == "its mask image has no clean partner"
    assert "32 x 24 px but its mask 32 x 10 px" in bad["small-mask"]
    assert "8 bits but the degraded one 16" in bad["deep"]


def test_an_image_that_the_manifest_names_but_nobody_has_is_bad(tmp_path: Path, write: Write, picture: Picture) -> None:
    write("clean/a.png", picture(1))
    (tmp_path / "manifest.csv").write_text("name\na\ngone\n")
    assert read("pairs", tmp_path)[1] == {"gone": "the manifest names it but no file has it"}


@pytest.mark.parametrize("name", ["kla", "magnetic-tile", "pairs"])
def test_a_folder_of_another_layout_is_refused_with_what_was_looked_for(tmp_path: Path, name: str) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(DataError, match=f"is not of layout '{name}': looked for"):
        list(read_layout(name, tmp_path))


def test_an_unknown_layout_or_folder_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="choose one of kla, magnetic-tile, pairs"):
        list(read_layout("mvtec", tmp_path))
    with pytest.raises(DataError, match="is not a folder"):
        list(read_layout("pairs", tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        ("file\na\n", "no column 'name'"),
        ("name\na\na.png\n", "names a twice"),
        ("name,split\na,dev\n", "write train, val or test"),
        ("name,white_level\na,12bit\n", "write a whole number"),
    ],
)
def test_a_manifest_that_cannot_be_meant_is_refused(
    tmp_path: Path, write: Write, picture: Picture, manifest: str, reason: str
) -> None:
    write("clean/a.png", picture(1))
    (tmp_path / "manifest.csv").write_text(manifest)
    with pytest.raises(DataError, match=reason):
        list(read_layout("pairs", tmp_path))
