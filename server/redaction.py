"""Text of prompts as an audit log may hold it: shortened, and without what looks like a secret or a person.

Knows some patterns and one length. Knows no log. A rule finds shapes, not meaning: a name or a street stays.
"""

import re
from typing import Final

MAX_CHARACTERS: Final = 4096
OVERLAP: Final = 1024  # what is cut off is looked at first, so that no half of a match stays

# Every repetition is bounded or begins anew at a character that ends it: time grows with length, no faster.
_TOKEN: Final = re.compile(r"[A-Za-z0-9_\-+/=]{16,}")
_PREFIXED: Final = re.compile(
    r"(?<![a-z0-9])(?:sk|pk|nt|rk|gh[a-z]|github_pat|xox[a-z]|glpat|hf|akia)[-_][a-z0-9_\-]{8,}",
    re.IGNORECASE,
)
_NAMED: Final = re.compile(
    r"(\bbearer\s+|(?:api[_-]?key|token|secret|passw(?:or)?d)[\"']?\s*[:=]\s*[\"']?)[^\s\"',;&]{4,}",
    re.IGNORECASE,
)
_CREDENTIALS: Final = re.compile(r"://[^\s/?#]{1,512}@[^\s/?#\"'<>()]{0,255}")
_AT: Final = "[@\uff20]"  # also as East Asian keyboards write it
_EMAIL: Final = re.compile(
    rf"(?:[^\s@\uff20<>()\"',;:]{{1,320}}|\"[^\"\n]{{1,64}}\"){_AT}[^\s@\uff20<>()\"',;:]{{1,255}}"
)
_DIGITS: Final = re.compile(r"\+?\d(?:[ ./()\-]{0,2}\d){6,}")


def redacted(text: str) -> str:
    """`text` with e-mail addresses as `[email]`, tokens like API keys and what is called one as `[key]`, and
    seven or more digits, also with single or double separators between them, as `[number]`; cut to
    `MAX_CHARACTERS`."""
    text = _CREDENTIALS.sub("://[key]", text[: MAX_CHARACTERS + OVERLAP])
    text = _EMAIL.sub("[email]", _NAMED.sub(r"\1[key]", text))
    text = _TOKEN.sub(_key_or_word, _PREFIXED.sub("[key]", text))
    return _DIGITS.sub("[number]", text)[:MAX_CHARACTERS]


def _key_or_word(found: re.Match[str]) -> str:
    """A long run with letters and digits is taken for a key; one without either for a word or a number."""
    token = found.group()
    mixed = any(each.isdigit() for each in token) and any(each.isalpha() for each in token)
    return "[key]" if mixed else token
