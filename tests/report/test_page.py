"""The page: text is escaped, pictures are inside, nothing is fetched."""

from __future__ import annotations

import base64
import pathlib

from neurode.report import figures
from neurode.report.page import Page


def test_text_is_escaped_and_code_is_set() -> None:
    page = Page("a < b", "lead & more")
    page.section("1. `x` & y")
    page.text("1 < 2, `f(x) < 3`")
    page.table(["name", "`n`"], [["<b>", "1"]])
    page.verdict("<i>plain</i>")
    markup = page.render("footer")
    assert "<title>a &lt; b</title>" in markup and "lead &amp; more" in markup
    assert "1 &lt; 2, <code>f(x) &lt; 3</code>" in markup
    assert "<b>" not in markup and "<i>" not in markup
    assert '<h2 id="s1">1. <code>x</code> &amp; y</h2>' in markup and 'href="#s1"' in markup


def test_figures_are_inlined(tmp_path: pathlib.Path) -> None:
    figure, axes = figures.panels(width=2.0, height=1.5)
    axes.plot([0, 1])
    path = figures.save(figure, tmp_path / "line.png")
    page = Page("t", "l")
    page.section("1.")
    page.figure(path, 'a "quoted" caption')
    markup = page.render()
    assert base64.b64encode(path.read_bytes()).decode() in markup
    assert 'alt="a &quot;quoted&quot; caption"' in markup
    assert "http" not in markup
