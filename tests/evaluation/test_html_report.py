"""The report as a browser's parser sees it: whole, alone, showing what it was given and nothing more."""

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from modulation.errors import DataError, MaskFormatError, NeuronTuneError
from modulation.evaluation.html.page import Html, element, escaped
from modulation.evaluation.html.plots import front
from modulation.evaluation.html_report import ExampleAnswers, evaluation_page, robustness_page
from modulation.evaluation.metrics import rate
from modulation.evaluation.quality import Figures, text_quality
from modulation.masks import Mask
from tests.tiny_models import random_mask, tiny_model

VOID = {"meta", "br"}
HOSTILE = "<script>alert(1)</script><img src=https://evil.example/x onerror=alert(1)>\"'&amp;$x$ #020300"


class Page(HTMLParser):
    """Elements as (tag, attributes), text by element, tables as rows of cells; refuses what is not nested."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        assert len(attrs) == len(dict(attrs)), attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))
        if self.tables and {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += " " * (self.open[-1] == "small") + data

    def values(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]

    def text_of(self, *tags: str) -> list[str]:
        return [data for tag, data in self.texts if tag in tags]

    def table(self, first_heading: str) -> list[list[str]]:
        (found,) = [each for each in self.tables if each[0][0].startswith(first_heading)]
        return found


def rates(count: int, total: int) -> Any:
    return rate([True] * count + [False] * (total - count))


def figures(attacked: int, refused: int) -> Figures:
    return Figures(  # type: ignore[typeddict-item]
        asr=rates(attacked, 40),
        asr_by_family={"fiction": rates(attacked // 2, 20), HOSTILE: rates(attacked - attacked // 2, 20)},
        over_refusal=rates(refused, 30),
        benign_correct=rates(49, 50),
        refusal_plain=rates(9, 10),
        perplexity={"perplexity": 1.23456, "num_tokens": 321, "num_answers": 17},
        **text_quality(["one two three", ""]),
    )


LEVELS = {"off": figures(31, 4), "security-critical": figures(7, 12), "3": figures(20, 5)}
RUN = {"model": "demo", "data": HOSTILE, "command": "neurontune evaluate", "versions": "torch 2.13"}
EXAMPLES = [ExampleAnswers(HOSTILE, "harmful", {"off": f"{HOSTILE}\nsecond line\x00\ud800", "3": "no"})]
POINTS: Any = [
    {"level": level, "pruned": kind, "num_pruned": n, "figures": {"asr": rates(n + 3, 40)}}
    for level in ("off", "security-critical")
    for kind in ("safety", "random 0")
    for n in (0, 5)
]


@pytest.fixture(scope="module")
def mask() -> Mask:
    made = random_mask(tiny_model())
    points = [{"threshold": [n, n], "metrics": {"asr": rates(30 - n, 40)}} for n in (0, 3, 6)]
    curve = [
        {"threshold": [s, u], "metrics": {k: v for k, v in figures(30 - s, 4 + s).items() if k != "length"}}
        for s, u in ((0, 0), (1, 9), (6, 3), (12, 9), (4, 4))
    ]
    metadata = made.metadata.model_copy(update={"evaluation": {"curve": curve + points, "split": "tune"}})
    return replace(made, metadata=metadata)


@pytest.fixture(scope="module")
def text(mask: Mask) -> str:
    return evaluation_page({"levels": LEVELS}, RUN, mask, EXAMPLES, POINTS)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def test_the_page_is_whole_and_its_names_are_its_own(page: Page) -> None:
    ids = page.values("id")
    assert len(ids) == len(set(ids)) and page.elements[0] == ("html", {"lang": "en"})
    for value in page.values("aria-labelledby"):
        assert set(value.split()) <= set(ids)
    referred = [each.removeprefix("#") for each in page.values("href")]
    styles = " ".join([*page.values("style"), *page.values("clip-path")])
    referred += re.findall(r"url\(#([^)]+)\)", styles)
    assert referred and set(referred) <= set(ids)


def test_nothing_comes_from_elsewhere_and_nothing_runs(page: Page, text: str) -> None:
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "foreignObject"}
    assert not [name for _, each in page.elements for name in each if name.startswith(("on", "src", "xlink"))]
    assert all(value.startswith("#") for value in page.values("href"))
    markup = [value for _, each in page.elements for value in each.values()] + page.text_of("style")
    assert not [each for each in markup if re.search(r"https?:|//|@import|url\((?!#)", each)]
    assert ("meta", "Content-Security-Policy") in [
        (tag, each.get("http-equiv")) for tag, each in page.elements
    ]
    assert "default-src 'none'" in page.values("content")[0]
    assert "<script" not in text and "<img" not in text


def test_what_others_wrote_is_shown_as_they_wrote_it(page: Page, text: str) -> None:
    assert page.text_of("dd")[1] == HOSTILE
    assert HOSTILE in page.text_of("p") and f"{HOSTILE}\nsecond line\ufffd\ufffd" in page.text_of("span")
    assert HOSTILE in [row[0] for row in page.table("family")]
    assert any(each.startswith("<script>") for each in page.text_of("text"))  # shortened, in the drawing
    assert text.encode("utf-8").decode() == text


def test_the_summary_shows_the_numbers_that_were_given(page: Page) -> None:
    heading, *rows = page.tables[0]
    assert heading[1:5] == [
        "attack success lower is better",
        "over-refusal lower is better",
        "benign correct higher is better",
        "plain harmful refused higher is better",
    ]
    for row, (level, given) in zip(rows, LEVELS.items(), strict=True):
        assert row[0].split()[0] == level
        for cell, name in zip(
            row[1:5], ("asr", "over_refusal", "benign_correct", "refusal_plain"), strict=True
        ):
            seen: Any = given[name]  # type: ignore[literal-required]
            shown = re.fullmatch(r"([\d.]+) % (\d+)/(\d+) ([\d.]+) to ([\d.]+) %", cell)
            assert shown, cell
            assert (int(shown[2]), int(shown[3])) == (seen["count"], seen["total"])
            for found, expected in zip(shown.group(1, 4, 5), ("rate", "low", "high"), strict=True):
                assert float(found) == pytest.approx(100 * seen[expected], abs=0.0501)
        assert row[5] == "1.235 321 tokens 17 answers"
        assert row[6].startswith("0.0 % 0/2") and row[7] == "1.5 median 1.5 1/2 empty"


def test_families_pruning_layers_and_factors_show_the_numbers_that_were_given(page: Page, mask: Mask) -> None:
    for row in page.table("family")[1:]:
        for cell, given in zip(row[1:], LEVELS.values(), strict=True):
            seen = given["asr_by_family"][row[0]]
            assert f" {seen['count']}/{seen['total']}, " in cell
    for row, n in zip(page.table("pruned")[1:], (0, 5), strict=True):
        assert row[0] == str(n) and all(f" {n + 3}/40, " in cell for cell in row[1:]) and len(row) == 5
    by_layer = {(kind, layer): 0 for kind in ("safety", "utility") for layer in range(3)}
    for kind, found in (("safety", mask.safety), ("utility", mask.utility)):
        for layer, _ in found.neurons.tolist():
            by_layer[kind, layer] += 1
    expected = [[str(n), str(by_layer["safety", n]), str(by_layer["utility", n])] for n in range(3)]
    assert page.table("layer")[1:] == expected
    factors = sorted(mask.safety.factors.tolist())
    assert page.table("set")[1][:3] == ["safety", "12", f"{factors[0]:.3g}"]
    assert page.table("set")[1][6] == f"{factors[-1]:.3g}"


def test_the_sweep_of_the_mask_is_drawn_and_its_named_levels_are_marked(page: Page) -> None:
    rows = page.table("safety, utility")[1:]
    assert [row[0] for row in rows[:5]] == ["0, 0", "1, 9", "6, 3", "12, 9", "4, 4"]
    assert [row[1] for row in rows[:5]] == ["", "utility-priority", "balanced", "security-critical", ""]
    assert rows[1][2:4] == ["72.5 %", "16.7 %"] and rows[-1][3] == "-"
    drawn = page.text_of("text")
    assert {"the mask's sweep", "best of the sweep", "named levels in the sweep"} <= set(drawn)


def test_every_drawing_is_told_to_those_who_cannot_see_it(page: Page) -> None:
    drawings = [each for tag, each in page.elements if tag == "svg"]
    assert len(drawings) == 5 and all(each["role"] == "img" for each in drawings)
    assert len(page.text_of("desc")) == 5
    assert "security-critical: over-refusal, % 40.0, attack success 17.5 %" in page.text_of("desc")[0]


def test_drawings_follow_the_page_between_light_and_dark(text: str) -> None:
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    used = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]+)", drawings))
    assert not used and "var(--series-1)" in drawings and "var(--ink)" in drawings


def test_the_same_input_gives_the_same_page(text: str, mask: Mask) -> None:
    assert evaluation_page({"levels": LEVELS}, RUN, mask, EXAMPLES, POINTS) == text
    assert not re.search(r"20\d\d-\d\d-\d\d", text)


def test_what_was_not_measured_is_left_out() -> None:
    page = Page(evaluation_page({"levels": {"5": Figures(benign_correct=rates(3, 4))}}, {}))
    assert page.text_of("h2") == ["Summary"] and len(page.tables[0][0]) == 2
    alone = Page(robustness_page(POINTS, {"model": "demo"}))
    assert alone.text_of("h1", "h2") == ["Robustness of demo to pruning", "Robustness to pruning"]


def test_a_result_without_levels_and_a_sweep_that_is_none_are_refused(mask: Mask) -> None:
    with pytest.raises(DataError, match="holds no levels"):
        evaluation_page({"levels": {}}, RUN)
    for wrong in (
        7,
        [7],
        [{"threshold": [1], "metrics": {}}],
        [{"threshold": [1, 2], "metrics": {"asr": 1}}],
    ):
        broken = replace(mask, metadata=mask.metadata.model_copy(update={"evaluation": {"curve": wrong}}))
        with pytest.raises(MaskFormatError, match=r"'evaluation\.curve' is not a list of objects"):
            evaluation_page({"levels": LEVELS}, RUN, broken)


def test_without_matplotlib_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(NeuronTuneError, match=r"pip install 'neurontune\[evaluation\]'"):
        evaluation_page({"levels": LEVELS}, RUN)


def test_text_is_escaped_once_and_markup_never() -> None:
    assert element("p", "a<b", Html("<br>"), title='"') == '<p title="&quot;">a&lt;b<br></p>'
    assert escaped(escaped("&")) == "&amp;"


def test_the_best_of_a_sweep_is_what_nothing_beats_in_both() -> None:
    points = [(3.0, 5.0), (1.0, 9.0), (2.0, 9.0), (2.0, 6.0), (4.0, 5.0), (5.0, 1.0)]
    beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] <= p[1]}
    assert front(points) == sorted(set(points) - beaten)
