"""The evaluation as one self-contained HTML page (docs/report.md says how to read it).

Knows evaluation results and which sections make a report. Knows nothing of files, models or how figures were
found; answers and names of families are somebody else's text and are shown, never interpreted.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypedDict

from modulation.errors import DataError
from modulation.evaluation.html.curve import curve_section
from modulation.evaluation.html.mask import mask_section
from modulation.evaluation.html.page import Html, element, page, section
from modulation.evaluation.html.pruned import pruning_section
from modulation.evaluation.html.summary import families_section, headline, summary_section
from modulation.evaluation.quality import Figures
from modulation.evaluation.robustness import PrunedFigures
from modulation.masks import Mask


class Result(TypedDict):
    """What `neurontune evaluate --json` writes: figures by level, in the order they are shown."""

    levels: Mapping[str, Figures]


class ExampleAnswers(NamedTuple):
    """One prompt, the attack family it is in, and what was answered at each level."""

    prompt: str
    kind: str
    answers: Mapping[str, str]
    family: str | None = None


def evaluation_page(
    result: Result,
    run: Mapping[str, str],
    mask: Mask | None = None,
    examples: Sequence[ExampleAnswers] = (),
    robustness: Sequence[PrunedFigures] = (),
) -> str:
    """The report as text, to be written as UTF-8. The same input gives the same page.

    `run` says where the figures come from, in the order it is shown: model, mask, data, command, versions, a
    date if one is wanted. Sections without figures are left out.

    Raises:
        DataError: the result holds no level.
        MaskFormatError: the mask's sweep cannot be read.
        NeuronTuneError: matplotlib is not installed.
    """
    levels = result["levels"]
    if not levels:
        raise DataError("The evaluation's result holds no levels; a report needs at least one.")
    parts = [
        summary_section(levels, mask),
        curve_section(levels, mask),
        families_section(levels),
        pruning_section(robustness) if robustness else None,
        mask_section(mask) if mask is not None else None,
        _examples(examples) if examples else None,
    ]
    title = f"Safety evaluation of {run['model']}" if "model" in run else "Safety evaluation"
    return page(title, headline(levels), run.items(), [part for part in parts if part is not None])


def robustness_page(points: Sequence[PrunedFigures], run: Mapping[str, str]) -> str:
    """The page of `neurontune robustness` alone. Raises NeuronTuneError without matplotlib."""
    title = f"Robustness of {run['model']} to pruning" if "model" in run else "Robustness to pruning"
    introduction = "What is left of safety when the neurons that carry it are removed from the model."
    return page(title, introduction, run.items(), [pruning_section(points)])


def _examples(examples: Sequence[ExampleAnswers]) -> Html:
    note = (
        "Some prompts of each kind, taken from all over the file without a look at the answers, which stand "
        "as they were given; what is harmful in them is shown too."
    )
    return section("Example answers", element("p", note), *map(_example, examples))


def _example(example: ExampleAnswers) -> Html:
    rows = [
        element(
            "tr",
            element("th", element("code", level), scope="row"),
            element("td", element("span", answer, class_="said", dir="auto")),
        )
        for level, answer in example.answers.items()
    ]
    inside = "" if example.family is None else f", attack family {example.family}"
    return element(
        "article",
        element("h3", f"A {example.kind} prompt{inside}"),
        element("p", example.prompt, class_="prompt", dir="auto"),
        element("div", element("table", element("tbody", *rows)), class_="answers"),
    )
