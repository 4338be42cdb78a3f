"""What the code on the pages prints, put under it and held to it.

    python docs/printed.py docs/start/snntorch.md

A block of text under ``<!-- printed -->`` is what the Python block before it prints. This script
writes such blocks anew; the tests run the pages and compare.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path

#: Python blocks, with the reason why one is not run, and printed ones.
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+?) -->\s*\n)?^```python[^\n]*\n(?P<code>.*?)^```"
    r"|<!-- printed -->\s*\n```text\n(?P<printed>.*?)^```",
    re.M | re.S,
)

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def run(page: Path) -> list[tuple[str, str, re.Match[str]]]:
    """Run a page's Python blocks, in order and in one namespace.

    Returns:
        For every printed block: what the page says, what was printed, and the match.
    """
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": "docs"}
    found, last = [], ""
    for match in BLOCK.finditer(text):
        if match["printed"] is not None:
            found.append((match["printed"], last, match))
        elif not match["reason"]:
            # Padded, so that a traceback shows the line of the page.
            code = "\n" * text.count("\n", 0, match.start("code")) + match["code"]
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, str(page), "exec"), namespace)
            last = "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())
    return found


def differences(said: str, printed: str) -> list[str]:
    """Lines that do not say the same: other words, or numbers further apart than machines are.

    Training adds up in another order on another processor, so numbers may differ by a quarter or by
    0.05; a rate that has become 0 is a difference however small it was. Below 0.0001 all is noise.
    """
    a, b = said.splitlines(), printed.splitlines()
    if len(a) != len(b):
        return [f"{len(a)} lines are said and {len(b)} were printed:\n{printed}"]
    return [f"said:    {x}\nprinted: {y}" for x, y in zip(a, b, strict=True) if not _alike(x, y)]


def _alike(said: str, printed: str) -> bool:
    def words(line: str) -> str:
        return re.sub(r"\s+|-{2,}", " ", _NUMBER.sub("#", line)).strip()

    def numbers(line: str) -> list[float]:
        return [float(n.replace(",", "")) for n in _NUMBER.findall(line)]

    if words(said) != words(printed):
        return False
    return all(
        (abs(a) < 1e-4) == (abs(b) < 1e-4) and abs(a - b) <= max(0.25 * abs(a), 0.05)
        for a, b in zip(numbers(said), numbers(printed), strict=True)
    )


def main() -> None:
    """Write the printed blocks of the pages named on the command line."""
    for name in sys.argv[1:]:
        page = Path(name).resolve()
        text = page.read_text(encoding="utf-8")
        here = Path.cwd()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                found = run(page)
            finally:
                os.chdir(here)
        for _, printed, match in reversed(found):
            text = text[: match.start("printed")] + printed + text[match.end("printed") :]
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
