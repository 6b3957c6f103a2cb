import re
from pathlib import Path

import pytest

from kintsugi.errors import ConfigError
from kintsugi.parcel import Parcel, check_inside, check_size, digest, lay_out, pack_named, package_folders


@pytest.fixture
def here(tmp_path: Path) -> Path:
    for name in ("here/configs/a.yaml", "here/data/1.png", "here/data/2.png", "other/space.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path / "here"


def files(folder: Path) -> list[tuple[int, Path]]:
    return [(path.stat().st_size, path) for path in folder.rglob("*") if path.is_file()]


def test_the_packages_are_found_where_they_are_imported_from() -> None:
    assert [Path(folder).name for folder in package_folders()] == ["kintsugi", "kintsugi_tune", "kintsugi_serve"]
    assert all((Path(folder) / "__init__.py").is_file() for folder in package_folders())


def test_a_file_below_this_folder_keeps_its_path_and_the_command_its_words(here: Path, tmp_path: Path) -> None:
    words = ["train", "configs/a.yaml", "--name", "unet"]
    parcel = pack_named(words, [Path("configs/a.yaml")], here)
    lay_out(parcel, tmp_path / "job")
    assert parcel.words == words
    assert (tmp_path / "job/configs/a.yaml").read_text() == "here/configs/a.yaml"


@pytest.mark.parametrize("form", ["{}", "--config={}"])
@pytest.mark.parametrize("absolute", [True, False])
def test_a_file_from_elsewhere_goes_along_under_a_path_that_the_command_then_names(
    here: Path, tmp_path: Path, form: str, absolute: bool
) -> None:
    path = tmp_path / "other/space.yaml" if absolute else Path("../other/space.yaml")
    parcel = pack_named(["tune", form.format(path), "--name", "other"], [path], here)
    lay_out(parcel, tmp_path / "job")
    assert parcel.words == ["tune", form.format("sent/0/space.yaml"), "--name", "other"]
    assert (tmp_path / "job/sent/0/space.yaml").read_text() == "other/space.yaml"


def test_a_folder_goes_along_with_what_it_holds_once(here: Path, tmp_path: Path) -> None:
    lay_out(pack_named([], [Path("data"), Path("data/1.png"), Path("data")], here), tmp_path / "job")
    assert sorted(path.name for path in (tmp_path / "job/data").iterdir()) == ["1.png", "2.png"]


def test_the_folder_itself_can_go_along(here: Path, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    parcel = pack_named(["data", "build", "pairs", "."], [Path(".")], here)
    lay_out(parcel, tmp_path / "job")
    assert (tmp_path / "job" / parcel.words[-1] / "data/1.png").is_file()


def test_a_path_that_is_not_there_is_refused_before_anything_is_sent(here: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape("none.yaml does not exist: a job takes along")):
        pack_named(["train", "none.yaml"], [Path("none.yaml")], here)


def test_too_much_is_refused_with_the_largest_files_and_the_remedy(tmp_path: Path) -> None:
    sizes = {"a.bin": 2_000_000, "below/b.bin": 3_500_000, "c.txt": 10, **{f"{n}.txt": n for n in range(8)}}
    sent = [(size, tmp_path / name) for name, size in sizes.items()]
    check_size(sent, tmp_path, 5.6)
    with pytest.raises(ConfigError) as refused:
        check_size(sent, tmp_path, 5)
    told = str(refused.value)
    assert told.startswith(
        "the job would take along 5.5 MB in 11 files, more than 5 MB; the largest: below/b.bin (3.50 MB)"
    )
    assert "a.bin (2.00 MB), c.txt" in told and "0.txt" not in told
    assert ".rayignore" in told and "--max-mb" in told


def test_a_path_that_is_left_out_of_the_folder_is_refused(here: Path) -> None:
    sent = [path for _, path in files(here)]
    check_inside([Path("configs/a.yaml"), Path("data")], here, sent)
    for path in (Path("a.yaml"), here / "configs/a.yaml", Path("../other/space.yaml")):
        with pytest.raises(ConfigError, match="is not among the files that are sent"):
            check_inside([path], here, sent)


def test_the_digest_tells_other_contents_and_other_names_and_nothing_else(here: Path, tmp_path: Path) -> None:
    first = digest(files(here), here)
    copy = tmp_path / "copy"
    for _, path in files(here):
        (copy / path.relative_to(here)).parent.mkdir(parents=True, exist_ok=True)
        (copy / path.relative_to(here)).write_bytes(path.read_bytes())
    assert digest(files(copy)[::-1], copy) == first
    (copy / "data/1.png").rename(copy / "data/3.png")
    renamed = digest(files(copy), copy)
    (copy / "configs/a.yaml").write_text("changed")
    assert len({first, renamed, digest(files(copy), copy)}) == 3
    assert digest([], copy) == ""


def test_what_a_parcel_holds_is_linked_not_copied(here: Path, tmp_path: Path) -> None:
    lay_out(Parcel([], {"a.yaml": here / "configs/a.yaml"}), tmp_path)
    assert (tmp_path / "a.yaml").is_symlink()
