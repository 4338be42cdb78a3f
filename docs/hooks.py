"""mkdocs hooks: equations, roles in docstrings, "what next" on every page, and ``llms.txt``.

Browsers draw MathML themselves, so the pages carry no script for it and ask no server. In the
Markdown sources equations are LaTeX between dollar signs, which code hosts render too.
"""

from __future__ import annotations

import html
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.S)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.S)
#: Where the demo page, which is built without a site too, has its link to the site.
_PLACE = re.compile("<!-- in the site: a link to the documentation -->")
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr):<code>(~?)([\w.]+)</code>")


#: Where a page of a section leads, besides to the page behind it.
_LEADS = {
    "explanation": "../numerics.md",
    "api": "../howto/layers.md",
    "": "howto/bits.md",
}

_pages: list[Any] = []


def on_nav(nav: Any, **_: object) -> None:
    """Remember the pages, in the order in which they are read."""
    _pages[:] = nav.pages


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    """A page that does not say what next gets a link to the one behind it, and to one more."""
    if re.search(r"^## (What next|Where to go)", markdown, re.M):
        return markdown
    folder = posixpath.dirname(page.file.src_uri)
    links = []
    if page.next_page is not None:
        target = posixpath.relpath(page.next_page.file.src_uri, folder or ".")
        links.append(f"[{page.next_page.title}]({target})")
    lead = _LEADS.get(folder, "../howto/bits.md")
    titles = {other.file.src_uri: other.title for other in _pages}
    found = posixpath.normpath(posixpath.join(folder, lead))
    if found != page.file.src_uri and found in titles and titles[found] not in str(links):
        links.append(f"[{titles[found]}]({lead})")
    return f"{markdown.rstrip()}\n\n## What next\n\n{', '.join(links)}\n"


def on_post_build(config: Any, **_: object) -> None:
    """``llms.txt``: the pages with a sentence each, for programs that read; the demo's way back.

    The sentence is the page's ``description``, where it has one, or its first.
    """
    lines = [f"# {config['site_name']}", "", f"> {config['site_description']}", ""]
    for page in _pages:
        text = Path(page.file.abs_src_path).read_text(encoding="utf-8")
        said = page.meta.get("description") or first_sentence(text)
        lines.append(f"- [{page.title}]({page.file.dest_uri}): {said}")
    site = Path(config["site_dir"])
    (site / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    demo = site / "demo" / "index.html"
    text = demo.read_text(encoding="utf-8")
    demo.write_text(_PLACE.sub('<a href="../index.html">Documentation</a>', text), encoding="utf-8")


def first_sentence(markdown: str) -> str:
    """The first sentence of a page, without markup; of a page without one, what it documents."""
    prose = re.sub(r"^```.*?^```|<!--.*?-->", "", markdown, flags=re.M | re.S)
    for paragraph in re.split(r"\n\s*\n", prose):
        words = " ".join(paragraph.split())
        if words and not words.startswith(("#", "|", ":::", "!", "[!", "---")):
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[*`]", r"\1", words)
            return re.split(r"(?<=\.) (?=[^\d])", plain, maxsplit=1)[0].rstrip(":")
    return ", ".join(dict.fromkeys(re.findall(r"^::: (\S+)", markdown, flags=re.M)))


def on_page_content(content: str, **_: object) -> str:
    """Replace what ``pymdownx.arithmatex`` marked as equations, and ``:class:`` and its like."""
    content = _BLOCK.sub(lambda m: f'<div class="equation">{_mathml(m[1], "block")}</div>', content)
    content = _INLINE.sub(lambda m: _mathml(m[1], "inline"), content)
    content = content.replace("::</p>", ":</p>")  # before a block of code in a docstring
    return _ROLE.sub(_link, content)


def _mathml(latex: str, display: str) -> str:
    return str(convert(html.unescape(latex).strip(), display=display))


def _link(role: re.Match[str]) -> str:
    """A link that mkdocs-autorefs fills in where the reference holds the name."""
    shown = role[2].rsplit(".", 1)[-1] if role[1] else role[2]
    return f'<autoref optional identifier="{role[2]}"><code>{shown}</code></autoref>'
