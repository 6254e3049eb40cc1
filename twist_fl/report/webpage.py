"""The parts of an HTML page: self-contained, without scripts, readable on a phone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

from matplotlib.figure import Figure

from twist_fl.report import plots
from twist_fl.report.cells import Cells, fit

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 46rem; margin: 0 auto;
       padding: 0 1rem 3rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; font-weight: 600; margin: 1.2rem 0 .3rem; }
figure { margin: .5rem 0; } svg { width: 100%; max-width: 32rem; height: auto; } ul { padding-left: 1.2rem; }
figcaption, .note { font-size: .875rem; color: #444; }
/* Shadows where more is to the side: two that scroll with the table cover two that do not. */
.scroll { overflow-x: auto; background:
  linear-gradient(to right, #fff 1.5rem, #fff0) left / 3rem 100% no-repeat local,
  linear-gradient(to left, #fff 1.5rem, #fff0) right / 3rem 100% no-repeat local,
  linear-gradient(to right, #0003, #0000) left / .8rem 100% no-repeat scroll,
  linear-gradient(to left, #0003, #0000) right / .8rem 100% no-repeat scroll; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .6rem 0 .2rem; font-weight: 600; }
caption span { position: sticky; left: 0; display: inline-block; max-width: min(44rem, calc(100vw - 2rem)); }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; }
th:first-child { position: sticky; left: 0; background: #fff; text-align: left; padding-left: 0; }
tbody span { display: inline-block; width: max-content; max-width: min(12rem, 34vw); }
.words td, .words th { text-align: left; white-space: normal; vertical-align: top; }
.words td { min-width: 5rem; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem .8rem; font-size: .9375rem; }
dt { font-weight: 600; } dd { margin: 0; }
@media (max-width: 30rem) { dl { display: block; } dd { margin-bottom: .5rem; } }
nav ul { columns: 18rem; column-gap: 2rem; font-size: .875rem; } nav li { padding: .2rem 0; }
pre { overflow-x: auto; background: #f5f5f5; padding: .75rem; font-size: .8125rem; }
summary { cursor: pointer; padding: .4rem 0; }
@media print { body { max-width: none; font-size: 11pt; } figure, tr, dt, dd { break-inside: avoid; }
  h2, h3, caption { break-after: avoid; } .scroll { overflow: visible; background: none; }
  pre { white-space: pre-wrap; } }
"""


def page(title: str, body: str) -> str:
    """The whole document, in ASCII so that no encoding can spoil it."""
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""
    return page.encode("ascii", "xmlcharrefreplace").decode("ascii")


def table(lines: Sequence[Sequence[str]], caption: str, words: bool = False) -> str:
    """A table that scrolls sideways if it must, several of too many columns; headers are the first line and column."""
    return "\n".join(_table(part, caption, words) for part in fit(lines))


def _table(lines: Cells, caption: str, words: bool) -> str:
    header = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in lines[0])
    body = "\n".join(
        f'<tr><th scope="row">{_label(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in lines[1:]
    )
    kind = ' class="words"' if words else ""
    head = f"<caption><span>{escape(caption)}</span></caption><thead><tr>{header}</tr></thead>"
    return f'<div class="scroll" tabindex="0"><table{kind}>{head}\n<tbody>{body}</tbody></table></div>'


def figure(draw: Callable[[], Figure], name: str, title: str, caption: str) -> str:
    """A drawing inline, which a screen reader announces by `title`; ids in it start with `name`."""
    image = plots.svg(draw, name).replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _label(text: str) -> str:
    """A row's name, as wide as the style allows; `section.key` may go on in a second line after the full stop."""
    return f"<span>{escape(text).replace('.', '.<wbr>')}</span>"


def details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>\n{content}</details>"


def terms(meanings: Mapping[str, str]) -> str:
    """Words and what they mean."""
    return (
        "<dl>"
        + "\n".join(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in meanings.items())
        + "</dl>"
    )


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'
