"""One self-contained HTML page: text, tables and pictures, nothing to fetch."""

from __future__ import annotations

import html
import pathlib
from collections.abc import Sequence

from neurode.report.figures import data_uri

CSS = """
:root{--ink:#1d2733;--soft:#5b6b7c;--line:#dde3ea;--paper:#fff;--wash:#f5f7fa;--accent:#0072b2}
@media (prefers-color-scheme:dark){:root{--ink:#e6ebf1;--soft:#9fb0c0;--line:#33404d;--paper:#151b22;--wash:#1d252e;
--accent:#56b4e9}}
*{box-sizing:border-box}body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:960px;margin:0 auto;padding:40px 24px 80px}h1{font-size:30px;line-height:1.2;margin:0 0 8px}
h2{font-size:21px;margin:48px 0 10px;padding-top:14px;border-top:1px solid var(--line)}
.lead{color:var(--soft);font-size:18px;margin:0 0 24px}p{margin:10px 0}a{color:var(--accent)}
nav{background:var(--wash);border-radius:8px;padding:12px 18px;margin:24px 0;columns:2;column-gap:32px}
nav a{display:block;text-decoration:none;padding:2px 0}
table{border-collapse:collapse;width:100%;margin:16px 0;font-variant-numeric:tabular-nums;font-size:14.5px}
th,td{padding:7px 10px;text-align:right;border-bottom:1px solid var(--line)}th:first-child,td:first-child{text-align:left;white-space:nowrap}
th{color:var(--soft);font-weight:600;vertical-align:bottom}.scroll{overflow-x:auto}
figure{margin:18px 0}figure img{max-width:100%;border-radius:6px;background:#fff;display:block;margin:0 auto}
figcaption{color:var(--soft);font-size:14px;margin-top:6px}
.verdict{border-left:4px solid var(--accent);background:var(--wash);padding:10px 16px;border-radius:0 6px 6px 0;margin:16px 0}
code{background:var(--wash);padding:1px 5px;border-radius:4px;font-size:14px}footer{color:var(--soft);font-size:14px;
margin-top:56px;border-top:1px solid var(--line);padding-top:14px}
"""


class Page:
    """A page that grows from top to bottom.

    Args:
        title: its heading.
        lead: one sentence beneath.
    """

    def __init__(self, title: str, lead: str) -> None:
        self.title, self.lead = title, lead
        self.sections: list[tuple[str, list[str]]] = []

    def section(self, heading: str) -> None:
        """Begin a section."""
        self.sections.append((heading, []))

    def _add(self, markup: str) -> None:
        self.sections[-1][1].append(markup)

    def text(self, paragraph: str) -> None:
        """A paragraph; `code` between backticks is set as such."""
        self._add(f"<p>{_inline(paragraph)}</p>")

    def verdict(self, sentence: str) -> None:
        """A sentence that the reader must not miss."""
        self._add(f'<div class="verdict">{_inline(sentence)}</div>')

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the first column is left-aligned text, the others are numbers."""
        top = "".join(f"<th>{_inline(cell)}</th>" for cell in head)
        body = "".join("<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        self._add(f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>')

    def figure(self, path: pathlib.Path, caption: str) -> None:
        """A picture, inlined."""
        alt = html.escape(caption, quote=True)
        image = f'<img src="{data_uri(path)}" alt="{alt}">'
        self._add(f"<figure>{image}<figcaption>{_inline(caption)}</figcaption></figure>")

    def render(self, footer: str = "") -> str:
        """The whole page."""
        links = "".join(f'<a href="#s{i}">{_inline(name)}</a>' for i, (name, _) in enumerate(self.sections, 1))
        body = "".join(
            f'<section><h2 id="s{i}">{_inline(name)}</h2>{"".join(parts)}</section>'
            for i, (name, parts) in enumerate(self.sections, 1)
        )
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
            f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{CSS}</style></head><body><main>'
            f'<h1>{html.escape(self.title)}</h1><p class="lead">{_inline(self.lead)}</p><nav>{links}</nav>{body}'
            f"<footer>{_inline(footer)}</footer></main></body></html>"
        )


def _inline(text: str) -> str:
    """Escape, and set what stands between backticks as code."""
    parts = html.escape(text, quote=False).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
