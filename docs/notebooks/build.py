"""Write the notebooks from their scripts, which have a cell under every ``# %%``.

    python docs/notebooks/build.py

The scripts are what is edited and tested; notebooks are for those who open one. They are not named
like the notebooks, that is, like the hosts: a notebook would import them in place of these.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
NAMES = ("spikingjelly", "snntorch")


def notebook(script: str) -> str:
    """The ``.ipynb`` of a script, without outputs."""
    cells: list[dict[str, Any]] = []
    for number, part in enumerate(script.split("# %%")[1:]):
        kind, _, body = part.partition("\n")
        lines = body.strip("\n").splitlines()
        cell: dict[str, Any] = {"id": f"cell-{number}", "metadata": {}}
        if "markdown" in kind:
            cell["cell_type"] = "markdown"
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        else:
            cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
            lines = [re.sub("  # noqa: .*", "", line) for line in lines]
        cell["source"] = [f"{line}\n" for line in lines[:-1]] + lines[-1:]
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write them all."""
    for name in NAMES:
        script = (FOLDER / f"{name}_notebook.py").read_text(encoding="utf-8")
        (FOLDER / f"{name}.ipynb").write_text(notebook(script), encoding="utf-8")


if __name__ == "__main__":
    main()
