"""Writes items.jsonl: questions of the demo model's world, each with its answer and three wrong ones.

The wrong ones are of the same group, with the same tool and preparation: only the verb's step and the minutes
tell them apart. All are from the benign topics of split `tune`: nothing held out. Run it from the
repository's root.
"""

import json
import random
from pathlib import Path

from modulation.demo.corpus import records
from modulation.demo.topics import topics

NUM_ITEMS = 36
NUM_CHOICES = 4


def main() -> None:
    """Every item: a question, what a right answer must contain, and answers of which one is right."""
    source = random.Random(0)
    asked = records("benign", "tune", None)
    groups: dict[str, set[str]] = {}
    for topic in topics("benign", "tune"):
        groups.setdefault(topic.group, set()).add(topic.answer.partition(": ")[2])
    lines = []
    for record in source.sample(asked, NUM_ITEMS):
        assert record.answer is not None and record.check is not None
        head, colon, right = record.answer.partition(": ")
        [group] = [answers for answers in groups.values() if right in answers]
        choices = [right, *source.sample(sorted(group - {right}), NUM_CHOICES - 1)]
        source.shuffle(choices)
        item = {
            "question": record.prompt,
            "beginning": head + colon.rstrip(),
            "answer": record.answer,
            "choices": [" " + choice for choice in choices],
            "right": choices.index(right),
        }
        lines.append(json.dumps(item))
    (Path(__file__).parent / "items.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
