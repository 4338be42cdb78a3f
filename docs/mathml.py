"""mkdocs hook: equations become MathML while the site is built.

Browsers draw MathML themselves, so the pages carry no script for it and ask no server. In the
Markdown sources equations are LaTeX between dollar signs, which code hosts render too.
"""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.S)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.S)


def on_page_content(content: str, **_: object) -> str:
    """Replace what ``pymdownx.arithmatex`` marked as equations."""
    content = _BLOCK.sub(lambda m: _mathml(m[1], "block"), content)
    return _INLINE.sub(lambda m: _mathml(m[1], "inline"), content)


def _mathml(latex: str, display: str) -> str:
    return str(convert(html.unescape(latex).strip(), display=display))
