"""mkdocs hooks: equations become MathML, and roles in docstrings become links.

Browsers draw MathML themselves, so the pages carry no script for it and ask no server. In the
Markdown sources equations are LaTeX between dollar signs, which code hosts render too.
"""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.S)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.S)
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):<code>(~?)([\w.]+)</code>")


def on_page_content(content: str, **_: object) -> str:
    """Replace what ``pymdownx.arithmatex`` marked as equations, and ``:class:`` and its like."""
    content = _BLOCK.sub(lambda m: _mathml(m[1], "block"), content)
    content = _INLINE.sub(lambda m: _mathml(m[1], "inline"), content)
    return _ROLE.sub(_link, content)


def _mathml(latex: str, display: str) -> str:
    return str(convert(html.unescape(latex).strip(), display=display))


def _link(role: re.Match[str]) -> str:
    """A link that mkdocs-autorefs fills in where the reference holds the name."""
    shown = role[2].rsplit(".", 1)[-1] if role[1] else role[2]
    return f'<autoref optional identifier="{role[2]}"><code>{shown}</code></autoref>'
