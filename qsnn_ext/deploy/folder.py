"""Puts the files of an export into a folder that may hold the work of its owner."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

from qsnn_ext.errors import ConfigError
from qsnn_ext.files import write_atomically

_REMEDY = "Make room or name another folder."


def write_files(
    folder: Path, files: Mapping[str, str], editable: Collection[str], header: str
) -> None:
    """Write files over those of an earlier export, and over nothing else.

    A file is known by its first line, a license by all of its text. Those that their owner is to
    edit are kept, with a warning, where they are other than exported.

    Args:
        folder: Where to write; created if missing.
        files: Path in the folder -> ASCII text.
        editable: Paths of those that the owner is to edit.
        header: Path of the model's header, which ends with the model's name.

    Raises:
        ConfigError: If a file of somebody else's, or a project around another model, is in the way,
            or the folder cannot be written. In the first two cases it stays as it is.
    """
    try:
        there = {path: _text(folder / path) for path in files}
        kept = [p for p in editable if there[p] not in (None, files[p])]
        foreign = sorted(p for p in files if not _is_ours(p, there[p], files[p]))
        others = _other_models(folder, header) if editable else []
        if others and (kept or foreign):
            raise ConfigError(
                f"{folder} holds a project around the model {others[0]!r}: remove it or name "
                "another folder. Nothing was written."
            )
        if foreign:
            raise ConfigError(
                f"{folder} holds {', '.join(foreign)}, which is not of such an export: move it "
                "away or name another folder. Nothing was written."
            )
        for path, text in files.items():
            if path not in kept:
                _write(folder / path, text.encode("ascii"))
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # a name may hold what no file system takes
        raise ConfigError(f"{folder} could not be written: {error}. {_REMEDY}") from error
    if kept:
        warnings.warn(
            f"{folder}: kept {', '.join(sorted(kept))}, which differs from what export_c writes; "
            "remove it to have that",
            stacklevel=3,
        )


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(content), ConfigError, _REMEDY)


def _text(path: Path) -> str | None:
    """Text of a file, none where there is none; what is no file has that of no export."""
    if not path.exists():
        return None
    return path.read_text(encoding="ascii", errors="replace") if path.is_file() else ""


def _is_ours(path: str, there: str | None, text: str) -> bool:
    if there is None or path.endswith("LICENSE"):
        return there in (None, text)
    return _first_line(there) == _first_line(text)


def _first_line(text: str) -> str:
    """The first line of a file, without the title of a model."""
    return re.sub(r"^/\* \w+: ", "/* ", text.split("\n", 1)[0])


def _other_models(folder: Path, header: str) -> list[str]:
    """Names of models that have a header in the folder."""
    name = Path(header).stem
    found = folder.glob(re.sub(rf"\b{name}\b", "*", header))
    written = (p for p in found if "written by qsnn_ext.deploy.export_c" in (_text(p) or "")[:200])
    return sorted(p.stem for p in written if p.stem != name)
