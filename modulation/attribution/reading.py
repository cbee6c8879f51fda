"""A file of prompts to examples, answers that nobody wrote being made by the model itself.

Knows files, an opened model and a progress bar. Knows nothing of what the examples are for.
"""

from pathlib import Path

from tqdm import tqdm

from modulation.attribution.base import AttributionData
from modulation.attribution.examples import REFUSAL, attribution_data
from modulation.evaluation.answering import transformers_answerer
from modulation.evaluation.data import Record, read_records
from modulation.opening import Opened


def read_examples(path: Path, opened: Opened, refusal: str | None, batch_size: int) -> AttributionData:
    """Raises DataError as `read_records` and `attribution_data` do."""
    return examples_of(read_records(path), opened, refusal, batch_size)


def examples_of(
    records: list[Record], opened: Opened, refusal: str | None, batch_size: int
) -> AttributionData:
    """Examples of records; `refusal` None means the demo model's own words."""
    num_missing = sum(each.answer is None and each.kind != "harmful" for each in records)
    with tqdm(total=num_missing, unit="answer", disable=not num_missing) as bar:
        answerer = transformers_answerer(
            opened.model,
            opened.tokenizer,
            batch_size=batch_size,
            on_answered=lambda number: bar.update(number),
        )
        return attribution_data(records, answerer=answerer, refusal=REFUSAL if refusal is None else refusal)
