"""Images in Parquet files, as the Hugging Face hub keeps data sets.

A split is one or several files ``SPLIT-00000-of-00003.parquet``. A row has a picture file in a
struct with the field ``bytes``, in the column ``img`` or ``image``, and a label.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from qsnn_ext.errors import DataError, MissingDependencyError
from recipes.data.arrays import Arrays
from recipes.data.folders import LARGEST, SPLITS, decode_bytes

_NAME = re.compile(r"(train|test)-(\d{5})-of-(\d{5})(?:-[0-9a-f]+)?\.parquet$")
_COLUMNS = ("img", "image")
_ROWS = 512

Files = dict[str, list[Path]]


def find(place: Path) -> Files | None:
    """The Parquet files of both splits below a folder, in the order of their numbers, or none.

    Raises:
        DataError: A split or one of a split's files is missing.

    """
    shards: dict[str, dict[int, Path]] = {split: {} for split in SPLITS}
    totals: dict[str, int] = {}
    for path in sorted(place.rglob("*.parquet")) if place.is_dir() else ():
        match = _NAME.search(path.name)
        if match is None:
            continue
        split, number, total = match[1], int(match[2]), int(match[3])
        if number in shards[split] or totals.setdefault(split, total) != total:
            raise DataError(
                f"{path} is not the only file of its kind below {place}: leave there the Parquet "
                "files of one data set only."
            )
        shards[split][number] = path
    if not totals:
        return None
    for split in SPLITS:
        if split not in totals:
            raise DataError(f"{place} has no file {split}-*.parquet: fetch that too.")
        missing = [n for n in range(totals[split]) if n not in shards[split]]
        if missing:
            raise DataError(
                f"{place} lacks {len(missing)} of {totals[split]} Parquet files of the {split} "
                f"split, first {split}-{missing[0]:05d}-of-{totals[split]:05d}.parquet: fetch it."
            )
    return {split: [shards[split][n] for n in sorted(shards[split])] for split in SPLITS}


def read(files: Files, label: str, size: tuple[int, int], counts: dict[str, int]) -> Arrays:
    """Decode all pictures.

    Args:
        files: What :func:`find` has found.
        label: Column of the labels.
        size: Height and width of a picture.
        counts: How many pictures each split has; another number is refused before any is decoded.

    Raises:
        DataError: A file is damaged, or has other columns or more or fewer rows.
        MissingDependencyError: pyarrow is not installed.

    """
    images, labels = {}, {}
    for split, paths in files.items():
        opened = [_open(path) for path in paths]
        rows = sum(file.metadata.num_rows for file in opened)
        if rows != counts[split]:
            raise DataError(
                f"{paths[0].parent} has {rows:,} {split} rows in {len(paths)} Parquet files, "
                f"expected {counts[split]:,}: it is incomplete or another data set."
            )
        images[split] = np.empty((rows, *size, 3), np.uint8)
        labels[split] = np.empty(rows, np.int64)
        at = 0
        for path, file in zip(paths, opened, strict=True):
            told = f"Decoding {path.name}"
            for pictures, classes in track(_batches(path, file, label), told, transient=True):
                for picture, of_class in zip(pictures, classes, strict=True):
                    what = f"{path}, row {at}"
                    images[split][at] = _decode(picture, what, size)
                    labels[split][at] = of_class
                    at += 1
    return Arrays(images, labels)


def _decode(picture: Any, what: str, size: tuple[int, int]) -> NDArray[np.uint8]:
    data = picture.get("bytes") if isinstance(picture, dict) else None
    if not isinstance(data, bytes):
        raise DataError(f"{what} holds no picture: fetch the file again.")
    return decode_bytes(data, what, size)


def _open(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            "Reading Parquet files needs pyarrow: pip install pyarrow, or give the data set in "
            "another form."
        ) from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except Exception as error:  # pyarrow has many
        raise DataError(f"{path} is damaged ({error}): fetch it again.") from error
    groups = range(file.metadata.num_row_groups)
    sizes = [file.metadata.row_group(g).total_byte_size for g in groups]
    if sum(sizes) > LARGEST * max(1, file.metadata.num_rows):
        raise DataError(f"{path} unpacks to {sum(sizes):,} bytes: not the data set it is named as.")
    return file


def _batches(path: Path, file: Any, label: str) -> Any:
    names = file.schema_arrow.names
    column = next((name for name in _COLUMNS if name in names), None)
    if column is None or label not in names:
        raise DataError(
            f"{path} has the columns {', '.join(names)}; expected {' or '.join(_COLUMNS)}, and "
            f"{label}."
        )
    try:
        for batch in file.iter_batches(batch_size=_ROWS, columns=[column, label]):
            labels = batch.column(label)
            if labels.null_count:
                raise DataError(f"{path} has rows without a {label}: fetch it again.")
            yield batch.column(column).to_pylist(), labels.to_pylist()
    except DataError:
        raise
    except Exception as error:  # pyarrow has many
        raise DataError(f"{path} is damaged ({error}): fetch it again.") from error
