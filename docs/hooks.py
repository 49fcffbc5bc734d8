"""Formulas as MathML and the colours of code, made while the site is built: no page asks another host for anything."""

import re
from html import unescape

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pygments.formatters import HtmlFormatter

HIGHLIGHTING = "assets/highlight.css"

# `.. math::` with its indented lines
_DIRECTIVE = re.compile(r"^\.\. math::\n((?:[ \t]+\S.*\n|[ \t]*\n(?=[ \t]+\S))+)", re.MULTILINE)
_ROLE = re.compile(r":math:`([^`]+)`")
_LITERAL = re.compile(r"(?<=[^\s:])::(?=\n\s*\n {4})")
# what pymdownx.arithmatex makes of \(...\) and \[...\]
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


class _Docstrings(Preprocessor):
    """reStructuredText's formulas and literal blocks, which read well in a docstring, as Markdown has them."""

    def run(self, lines: list[str]) -> list[str]:
        text = _DIRECTIVE.sub(lambda found: f"\n\\[\n{_flush(found[1])}\n\\]\n\n", "\n".join(lines) + "\n")
        return _LITERAL.sub(":", _ROLE.sub(r"\\(\1\\)", text)).split("\n")


def _flush(lines: str) -> str:
    return "\n".join(line.strip() for line in lines.strip().splitlines())


class _DocstringMarkup(Extension):
    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802, the name that Markdown calls
        md.preprocessors.register(_Docstrings(md), "docstrings", 24)  # after fenced code is put aside


def on_config(config: MkDocsConfig) -> None:
    config.markdown_extensions.append(_DocstringMarkup())


def on_files(files: Files, config: MkDocsConfig) -> None:
    colours = HtmlFormatter(style="default").get_style_defs(".highlight")
    files.append(File.generated(config, HIGHLIGHTING, content=colours))


def on_page_content(html: str, **_: object) -> str:
    html = _BLOCK.sub(lambda found: convert(unescape(found[1].strip()), display="block"), html)
    return _INLINE.sub(lambda found: convert(unescape(found[1])), html)
