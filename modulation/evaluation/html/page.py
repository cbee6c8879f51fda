"""One self-contained HTML page: markup that escapes whatever is not markup, tables, and the page around.

Knows HTML. Knows nothing of evaluations. No scripts and nothing from elsewhere: the page's own policy
forbids both.
"""

import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

STYLE: Final = Path(__file__).with_name("report.css")
POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"

_NOT_TEXT: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
"""What HTML does not allow as text: control characters, lone surrogates, noncharacters."""


class Html(str):
    """Markup, put into a page as it stands. Any other `str` is escaped when it gets there."""


def printable(text: str) -> str:
    """`text` with what HTML does not allow in it shown as the replacement character."""
    return _NOT_TEXT.sub("\ufffd", text)


def escaped(text: str) -> Html:
    """`text` as markup that shows it, and does nothing else. Idempotent on markup."""
    if isinstance(text, Html):
        return text
    return Html(html.escape(printable(text), quote=True))


def joined(parts: Iterable[str]) -> Html:
    return Html("".join(escaped(part) for part in parts))


def element(tag: str, *children: str, **attributes: str) -> Html:
    """`<tag attributes>children</tag>`; an attribute's trailing underscore is dropped (`class_`)."""
    written = "".join(
        f' {name.removesuffix("_").replace("_", "-")}="{escaped(value)}"'
        for name, value in attributes.items()
    )
    return Html(f"<{tag}{written}>{joined(children)}</{tag}>")


def table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """A table whose first column heads its rows, in a box that scrolls sideways where it is too wide."""
    head = element("tr", *(element("th", each, scope="col") for each in headings))
    body = [
        element("tr", element("th", first, scope="row"), *(element("td", each) for each in rest))
        for first, *rest in rows
    ]
    inside = [element("caption", caption), element("thead", head), element("tbody", *body)]
    box = {"class_": "wide", "tabindex": "0", "role": "region", "aria_label": caption}
    return element("div", element("table", *inside), **box)


def folded(summary: str, *children: str) -> Html:
    """What is there for those who want it, closed at first."""
    return element("details", element("summary", summary), *children)


def figure(plot: Html, caption: str) -> Html:
    return element("figure", element("div", plot, class_="plot"), element("figcaption", caption))


def section(heading: str, *children: str) -> Html:
    return element("section", element("h2", heading), *children)


def page(title: str, introduction: str, run: Iterable[tuple[str, str]], sections: Iterable[Html]) -> str:
    """The whole page as text, to be written as UTF-8. `run` says where the figures come from."""
    facts = [element("div", element("dt", name), element("dd", value)) for name, value in run]
    head = [
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        Html('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Html('<meta name="color-scheme" content="light dark">'),
        element("title", title),
        Html(f"<style>\n{STYLE.read_text(encoding='utf-8')}</style>"),
    ]
    body = [
        element("h1", title),
        element("p", introduction),
        *([element("dl", *facts)] if facts else []),
        *sections,
    ]
    parts = [element("head", *head), element("body", element("main", *body))]
    return f"<!DOCTYPE html>\n{element('html', *parts, lang='en')}\n"
