"""Answers that match a grammar, by llguidance: JSON of a schema, or a Lark grammar.

Knows llguidance and a tokenizer. Knows no request, no batch.
"""

import json
from collections.abc import Collection

import llguidance
import llguidance.hf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from server.engines.base import Candidate, Grammar, GrammarError, UnsupportedByEngineError

# As json.dumps writes it, which is what models have read most of; no free white space, in which a small
# model loses itself.
JSON_STYLE = {"x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}}


class Grammars:
    """Grammars over one tokenizer's tokens. Matching is by bytes, so any token border is fine."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, vocabulary: int, stop_ids: Collection[int]
    ) -> None:
        self._decode = tokenizer.decode
        self._tokenizer: llguidance.LLTokenizer | None = None
        self._why_not = ""
        try:
            self._tokenizer = llguidance.hf.from_tokenizer(
                tokenizer, n_vocab=vocabulary, eos_token=sorted(stop_ids) or None
            )
        except (ValueError, TypeError) as error:
            self._why_not = _first_line(error)

    def spelling(self, token_id: int) -> bytes:
        """The bytes of a token; of a control token its name."""
        if self._tokenizer is None:
            text = self._decode([token_id])
            assert isinstance(text, str), type(text)
            return text.encode()
        found: bytes = self._tokenizer.decode_bytes([token_id])
        return found

    def candidate(self, token_id: int, logprob: float | None) -> Candidate:
        """A token at a place, spelled."""
        spelling = self.spelling(token_id)
        try:
            text = spelling.decode()
        except UnicodeDecodeError:  # part of a character; as OpenAI writes it
            text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)
        return Candidate(token_id, text, spelling, logprob)

    def matcher(self, grammar: Grammar) -> "GrammarMatcher":
        """A matcher at the grammar's beginning.

        Raises GrammarError for one that cannot be enforced, and UnsupportedByEngineError where none can.
        """
        if self._tokenizer is None:
            raise UnsupportedByEngineError(
                f"No grammar can be enforced on this model's tokens ({self._why_not}). Leave "
                f"{grammar.param} out.",
                grammar.param,
            )
        compiled = grammar.text
        try:
            if grammar.kind == "json_schema":
                compiled = llguidance.LLMatcher.grammar_from_json_schema(styled(grammar.text))
            else:
                compiled = llguidance.LLMatcher.grammar_from_lark(grammar.text)
        except ValueError as error:
            raise _refused(grammar, error) from error
        matcher = llguidance.LLMatcher(self._tokenizer, compiled, log_level=0)
        matcher.compute_bitmask()  # some grammars compile and then accept nothing, or grow without bounds
        if matcher.is_error():
            raise _refused(grammar, matcher.get_error())
        return GrammarMatcher(matcher, self._tokenizer.vocab_size)


class GrammarMatcher:
    """A grammar and how much of it the tokens so far have filled."""

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def restrict(self, scores: Tensor) -> None:
        """Set to -inf the scores, float32 (vocabulary,), of tokens that cannot come next, in place.

        Raises ValueError where no token can.
        """
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        accepted = np.unpackbits(packed, count=self._vocabulary, bitorder="little").astype(bool)
        scores.masked_fill_(torch.from_numpy(~accepted).to(scores.device), float("-inf"))

    def accept(self, token_id: int) -> None:
        """Take note of the token that came. Raises ValueError for one that does not fit."""
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the grammar could not be followed: {_first_line(self._matcher.get_error())}")


def styled(schema: str) -> str:
    """A JSON schema that also says how its JSON is written."""
    return json.dumps(json.loads(schema) | JSON_STYLE)


def _refused(grammar: Grammar, error: object) -> GrammarError:
    return GrammarError(f"The grammar of {grammar.param} cannot be used: {_first_line(error)}", grammar.param)


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0]
