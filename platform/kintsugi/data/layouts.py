"""Folders as others lay them out, read lazily into samples.

A pair that cannot be used is named with the reason, never dropped in silence.
"""

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

from kintsugi.data.sample import GOOD, UNLABELLED, RawSample, Sample, decode_sample
from kintsugi.errors import DataError
from kintsugi.imaging import decode_mask
from kintsugi.sections import Split

SPLITS: tuple[Split, ...] = get_args(Split)
Files = dict[str, list[Path]]

_KLA_SPLITS: Mapping[str, Split] = {"Train": "train", "Val": "val"}
_GOOD_NAMES = {"good", "free", "none", "ok", "normal"}
_IMAGE_SUFFIXES = {".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp"}
_NOT_DATA = {"thumbs.db", "desktop.ini"}


@dataclass(frozen=True)
class BadPair:
    """A sample that was set aside: `name` is its id, or the path of a file that belongs to none."""

    name: str
    reason: str


@dataclass(frozen=True)
class Label:
    """What is known of a name apart from its pixels. `defect_type` None: the mask tells."""

    part_id: str
    category: str = "default"
    defect_type: str | None = None
    split: Split | None = None
    white_level: int | None = None
    preset: str | None = None


@dataclass(frozen=True)
class Trio:
    """The files found under one name. `needs` names those that must be there beside the clean one."""

    name: str
    label: Label
    clean: list[Path] = field(default_factory=list)
    degraded: list[Path] = field(default_factory=list)
    mask: list[Path] = field(default_factory=list)
    needs: frozenset[str] = frozenset()


Reader = Callable[[Path], Iterator[Trio | BadPair]]


def read_layout(name: str, folder: Path) -> Iterator[RawSample | BadPair]:
    """Samples of `folder`, each read and checked (decodable, same size, channels and depth), in a stable order.

    Raises:
        DataError: there is no such layout, or the folder does not look like it.
    """
    for raw in read_unchecked(name, folder):
        checked = raw if isinstance(raw, BadPair) else check(raw)
        yield checked if isinstance(checked, BadPair) else raw


def read_unchecked(name: str, folder: Path) -> Iterator[RawSample | BadPair]:
    """As `read_layout`, for a caller that decodes the images itself with `check`."""
    if name not in LAYOUTS:
        raise DataError(f"there is no layout '{name}': choose one of {', '.join(LAYOUTS)}")
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give the folder that holds the images")
    for trio in LAYOUTS[name](folder):
        yield trio if isinstance(trio, BadPair) else _read(trio)


def check(raw: RawSample) -> Sample | BadPair:
    """The decoded sample, or the reason why it cannot be used."""
    try:
        return decode_sample(raw)
    except DataError as error:
        return BadPair(raw.sample_id, str(error))


def _read(trio: Trio) -> RawSample | BadPair:
    try:
        clean, degraded, mask = (_only_file(trio, role) for role in ("clean", "degraded", "mask"))
        assert clean is not None
        defect_type = trio.label.defect_type or _defect_type(mask)
        label = trio.label
        return RawSample(
            trio.name, label.part_id, label.category, defect_type, label.split, clean, mask, degraded,
            label.white_level, None if degraded is None else label.preset,
        )  # fmt: skip
    except OSError as error:
        return BadPair(trio.name, f"a file cannot be read ({error.strerror})")
    except DataError as error:
        return BadPair(trio.name, str(error))


def _only_file(trio: Trio, role: str) -> bytes | None:
    paths: list[Path] = getattr(trio, role)
    if len(paths) > 1:
        raise DataError(f"several {role} images share the name: {', '.join(sorted(path.name for path in paths))}")
    if not paths and role == "clean":
        left = " and ".join(other for other in ("degraded", "mask") if getattr(trio, other))
        raise DataError(
            f"its {left} image has no clean partner" if left else "the manifest names it but no file has it"
        )
    if not paths and role in trio.needs:
        raise DataError("it has no mask" if role == "mask" else f"it has no {role} image")
    return paths[0].read_bytes() if paths else None


def _defect_type(mask: bytes | None) -> str:
    if mask is None:
        return UNLABELLED
    return "defect" if decode_mask(mask).any() else GOOD


def _read_kla(folder: Path) -> Iterator[Trio | BadPair]:
    """`<category>/{Train,Val}/{Degraded_image,GT_clean_image,Defect_mask}/<defect>/NNN.png`, masks `NNN_mask.png`."""
    roots = [category / split for category in _folders(folder) for split in _KLA_SPLITS]
    if not any((root / "GT_clean_image").is_dir() for root in roots):
        raise DataError(
            f"{folder} is not of layout 'kla': looked for <category>/Train/GT_clean_image "
            "and <category>/Val/GT_clean_image"
        )
    for root in roots:
        yield from _kla_split(root, root.parent.name, _KLA_SPLITS[root.name])


def _kla_split(root: Path, category: str, split: Split) -> Iterator[Trio]:
    clean, degraded = _index(root / "GT_clean_image"), _index(root / "Degraded_image")
    mask = _index(root / "Defect_mask", drop="_mask")
    for name in sorted({*clean, *degraded, *mask}):
        defect_type = _normal(name.split("/")[0]) if "/" in name else None
        needs = {"degraded"} if defect_type == GOOD else {"degraded", "mask"}
        sample_id = f"{category}/{root.name}/{name}"
        label = Label(sample_id, category, defect_type, split)
        yield Trio(sample_id, label, clean.get(name, []), degraded.get(name, []), mask.get(name, []), frozenset(needs))


def _read_magnetic_tile(folder: Path) -> Iterator[Trio | BadPair]:
    """`MT_<defect>/Imgs/X.jpg` with the mask `X.png` beside it (Huang, Qiu and Yuan, The Visual Computer 2020).

    The files do not say which photographs show the same tile, so each is its own part unless a pattern says more.
    """
    classes = [path for path in _folders(folder) if (path / "Imgs").is_dir()]
    if not classes:
        raise DataError(
            f"{folder} is not of layout 'magnetic-tile': looked for MT_Crack/Imgs, MT_Free/Imgs and the like"
        )
    for root in classes:
        defect_type = _normal(root.name.removeprefix("MT_"))
        needs = frozenset() if defect_type == GOOD else frozenset({"mask"})
        for name, paths in sorted(_index(root / "Imgs").items()):
            sample_id = f"{root.name}/{name}"
            mask = [path for path in paths if path.suffix.lower() == ".png"]
            clean = [path for path in paths if path not in mask]
            label = Label(sample_id, "magnetic-tile", defect_type)
            yield Trio(sample_id, label, clean, [], mask, needs)


def _read_pairs(folder: Path) -> Iterator[Trio | BadPair]:
    """`clean/`, and `degraded/` and `mask/` where there are such, joined by name; below `train/ val/ test/` if split.

    `manifest.csv` beside them may give, for each `name`: part (or group), category, defect_type, split,
    white_level, preset (how the degraded image was made); role `unlabelled` marks an image that nobody vouches for.
    Without a defect_type the category serves if it names the good ones too, else the mask tells.
    """
    roots: list[tuple[Path, Split | None]] = [*((folder / split, split) for split in SPLITS), (folder, None)]
    if not any((root / "clean").is_dir() for root, _ in roots):
        raise DataError(f"{folder} is not of layout 'pairs': looked for clean/ or {{train,val,test}}/clean/")
    labels = _read_manifest(folder / "manifest.csv")
    masked = any((root / "mask").is_dir() for root, _ in roots)
    seen: set[str] = set()
    for root, split in roots:
        for pair in _pairs_below(root, split, labels, masked):
            seen.add(pair.name)
            yield pair
    for name in sorted(labels.keys() - seen):
        yield Trio(name, labels[name])


def _pairs_below(
    root: Path, split: Split | None, labels: Mapping[str, Label], masked: bool
) -> Iterator[Trio | BadPair]:
    clean, degraded = _index(root / "clean"), _index(root / "degraded")
    mask = _drop_suffix(_index(root / "mask"), "_mask", keep=set(clean))
    for name in sorted({*clean, *degraded, *mask}):
        label = labels.get(name) or Label(name, _top(name))
        if split and label.split and split != label.split:
            yield BadPair(name, f"manifest.csv puts it into {label.split} but its file lies in {split}/")
            continue
        needs = {"degraded"} if (root / "degraded").is_dir() else set[str]()
        if masked and label.defect_type not in (GOOD, UNLABELLED):
            needs.add("mask")
        label = replace(label, split=split or label.split)
        yield Trio(name, label, clean.get(name, []), degraded.get(name, []), mask.get(name, []), frozenset(needs))


def _read_manifest(path: Path) -> dict[str, Label]:
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8-sig") as handle:
        table = csv.DictReader(handle)
        columns = set(table.fieldnames or ())
        rows = [{key: (value or "").strip() for key, value in row.items() if key} for row in table]
    if "name" not in columns:
        raise DataError(f"{path} has no column 'name': add one with the names of the images, without folder and ending")
    kinds = {_normal(row.get("category", "")) for row in rows}
    defect_column = "defect_type" if "defect_type" in columns else "category" if GOOD in kinds else ""
    labels: dict[str, Label] = {}
    for row in rows:
        name = _stem(row["name"])
        if name in labels:
            raise DataError(f"{path} names {name} twice: keep one line for each image")
        labels[name] = _label(name, row, row.get(defect_column, ""), path)
    return labels


def _label(name: str, row: Mapping[str, str], defect_type: str, path: Path) -> Label:
    split, level = row.get("split", ""), row.get("white_level", "")
    if split and split not in SPLITS:
        raise DataError(f"{path}: {name} has the split '{split}': write train, val or test")
    if level and not level.isdecimal():
        raise DataError(f"{path}: {name} has the white level '{level}': write a whole number, or nothing")
    return Label(
        part_id=row.get("part") or row.get("group") or name,
        category=row.get("category") or _top(name),
        defect_type=UNLABELLED if row.get("role") == UNLABELLED else _normal(defect_type) or None,
        split=next((known for known in SPLITS if known == split), None),
        white_level=int(level) if level else None,
        preset=row.get("preset") or None,
    )


def _top(name: str) -> str:
    return name.split("/")[0] if "/" in name else "default"


def _normal(defect_type: str) -> str:
    lower = defect_type.strip().lower()
    return GOOD if lower in _GOOD_NAMES else lower


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _index(folder: Path, drop: str = "") -> Files:
    """Files below `folder` by relative path without ending; `drop` is taken off the end of the stem."""
    files: Files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith(".") and path.name.lower() not in _NOT_DATA:
            files.setdefault(_stem(path.relative_to(folder).as_posix()).removesuffix(drop), []).append(path)
    return files


def _drop_suffix(files: Files, suffix: str, keep: set[str]) -> Files:
    renamed: Files = {}
    for name, paths in files.items():
        renamed.setdefault(name if name in keep else name.removesuffix(suffix), []).extend(paths)
    return renamed


def _stem(name: str) -> str:
    head, dot, ending = name.rpartition(".")
    return head if dot and f".{ending.lower()}" in _IMAGE_SUFFIXES else name


LAYOUTS: Mapping[str, Reader] = {"kla": _read_kla, "magnetic-tile": _read_magnetic_tile, "pairs": _read_pairs}
