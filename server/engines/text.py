"""Between messages and tokens: chat template in, text out as it becomes complete.

Knows a tokenizer. Knows nothing of models, batches or requests.
"""

import inspect
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jinja2 import meta
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template

from server.engines.base import (
    Chat,
    Grammar,
    Message,
    ParsedAnswer,
    Prompt,
    PromptError,
    PromptTooLongError,
    UnsupportedByEngineError,
)
from server.engines.tools import find_tool_format


class ChatText:
    """A tokenizer with a chat template, as the engines use it. `stop_ids` end an answer; `vocabulary` is
    how many tokens the model has."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        stop_ids: Collection[int],
        vocabulary: int,
        max_tokens: int | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        longest = max(map(len, tokenizer.get_vocab()), default=1)
        self._max_characters = None if max_tokens is None else max_tokens * longest
        self._max_tokens = max_tokens
        self._vocabulary = vocabulary
        special = {
            number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._control = list(special.values())
        self._tool_format = find_tool_format(tokenizer)
        self.stop_ids = frozenset(stop_ids)
        markers = self._tool_format.markers if self._tool_format is not None else frozenset()
        self._silent = self.stop_ids | special.keys()
        self._silent_but_markers = self.stop_ids | {
            number for number, token in special.items() if token not in markers
        }

    def encode(self, prompt: Prompt) -> list[int]:
        """The prompt's tokens: of a conversation, up to where the assistant's answer begins.

        Raises:
            PromptError: it is empty, holds a control token where none may be, or a number that is no token,
                or the model's chat template refuses it.
            PromptTooLongError: it is far longer than `max_tokens`, which bounds nothing else here.
            UnsupportedByEngineError: the chat template does not take what is asked for.
        """
        if isinstance(prompt, Chat):
            text = self._rendered(prompt)
            self._refuse_hopeless(text)
            ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        elif isinstance(prompt, str):
            self._refuse_hopeless(prompt)
            ids = list(self._tokenizer(prompt)["input_ids"])
        else:
            self._refuse_unknown(prompt)
            ids = list(prompt)
        if not ids:
            raise PromptError("The prompt is empty: it has no tokens. Send at least one.")
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens, control tokens included. Raises PromptError for a number that is no token."""
        self._refuse_unknown(token_ids)
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        assert isinstance(text, str), type(text)
        return text

    def spell(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each token by itself. Raises PromptError for a number that is no token."""
        texts = {token: self.decode([token]) for token in set(token_ids)}
        return [texts[token] for token in token_ids]

    def parse(self, text: str, chat: Chat) -> ParsedAnswer:
        """Take an answer apart by the model's format of tool calls."""
        if self._tool_format is None or not chat.tools:
            return ParsedAnswer(text, ())
        prompt = self._apply_template(chat, tools=list(chat.tools))
        return self._tool_format.parse(text, prompt, chat.tools)

    @property
    def tool_marker(self) -> str:
        """With what a tool call begins in an answer's text; empty: not known."""
        return self._tool_format.marker if self._tool_format is not None else ""

    def tool_grammar(self, chat: Chat, name: str | None, several: bool) -> Grammar:
        """A grammar of answers that call a tool. Raises UnsupportedByEngineError and GrammarError."""
        if self._tool_format is None:
            raise UnsupportedByEngineError(_UNKNOWN_FORMAT, "tool_choice")
        return self._tool_format.grammar(chat.tools, name, several)

    def _rendered(self, chat: Chat) -> str:
        if not chat.messages:
            raise PromptError("The conversation has no messages; send at least one.")
        self._refuse_control_tokens(chat)
        self._refuse_arguments(chat.template_arguments)
        text = self._apply_template(chat, tools=list(chat.tools) or None)
        if chat.tools and text == self._apply_template(chat, tools=None):
            raise UnsupportedByEngineError(
                "This model's chat template has no place for tools. Leave tools out, or serve a model that "
                "was trained to call them.",
                "tools",
            )
        if chat.tools and self._tool_format is None:
            raise UnsupportedByEngineError(_UNKNOWN_FORMAT, "tools")
        return text

    def _refuse_hopeless(self, text: str) -> None:
        """Raises PromptTooLongError for text that cannot fit even in the longest tokens, before it costs
        seconds and gigabytes to tokenise."""
        if self._max_characters is not None and len(text) > self._max_characters:
            raise PromptTooLongError(
                f"The prompt has {len(text)} characters, more than the {self._max_tokens} tokens of this "
                "model's context can hold. Shorten it."
            )

    def _apply_template(self, chat: Chat, tools: list[Any] | None) -> str:
        turns = [_turn(each) for each in chat.messages]
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tools=tools, tokenize=False, add_generation_prompt=True, **chat.template_arguments
            )
        except Exception as error:  # a template may raise anything on what it did not expect
            raise PromptError(f"The model's chat template refuses these messages: {error}") from error
        assert isinstance(text, str), type(text)
        return text

    def _refuse_arguments(self, given: Mapping[str, Any]) -> None:
        """An argument that the template does not read would be ignored; one of ours would be overridden."""
        if not given:
            return
        ours = set(inspect.signature(self._tokenizer.apply_chat_template).parameters)
        template = self._tokenizer.get_chat_template()
        assert isinstance(template, str), type(template)
        environment = _compile_jinja_template(template).environment  # with the tags that templates may have
        read = meta.find_undeclared_variables(environment.parse(template))
        accepted = sorted(read - ours - set(self._tokenizer.special_tokens_map) - _OF_TEMPLATES)
        for name in given:
            if name not in accepted:
                raise UnsupportedByEngineError(
                    f"chat_template_kwargs: this model's chat template does not read {name!r}; accepted: "
                    f"{', '.join(accepted) or 'none'}.",
                    "chat_template_kwargs",
                )

    def _refuse_unknown(self, token_ids: Sequence[int]) -> None:
        for token in token_ids:
            if not 0 <= token < self._vocabulary:
                raise PromptError(
                    f"{token} is no token of this model; accepted: whole numbers from 0 to "
                    f"{self._vocabulary - 1}."
                )

    def _refuse_control_tokens(self, chat: Chat) -> None:
        """A control token in a message would be read as one: a user could write the assistant's turn."""
        arguments = json.dumps(dict(chat.template_arguments), ensure_ascii=False)
        places = [("chat_template_kwargs", arguments)]
        places += [(f"Message {number}", _written(each)) for number, each in enumerate(chat.messages)]
        places += [
            (f"Tool {number}", json.dumps(each, ensure_ascii=False)) for number, each in enumerate(chat.tools)
        ]
        for place, text in places:
            for token in self._control:
                if token in text:
                    raise PromptError(
                        f"{place} contains {token!r}, a control token of this model. Take it "
                        "out, or break it up, for example with a space."
                    )

    def stream(self, prompt: Prompt) -> "TextStream":
        """A new stream that turns the tokens of one answer to `prompt` into text. Where tools may be called,
        the text keeps the control tokens that `parse` looks for."""
        has_tools = isinstance(prompt, Chat) and bool(prompt.tools)
        return TextStream(self._tokenizer, self._silent_but_markers if has_tools else self._silent)


_UNKNOWN_FORMAT = (
    "How this model writes calls of tools is not known: its tokenizer has no response template that tells, "
    "nor does its chat template write them as Hermes and Qwen do. Leave tools out, or serve another model."
)

# What transformers itself gives to every template.
_OF_TEMPLATES = frozenset({"messages", "raise_exception", "strftime_now", "tojson"})


def _turn(message: Message) -> dict[str, Any]:
    """A message as chat templates know it. "developer" is OpenAI's newer name for "system"."""
    role = "system" if message.role == "developer" else message.role
    turn: dict[str, Any] = {"role": role, "content": message.content}
    if message.tool_calls:
        turn["tool_calls"] = [dict(each) for each in message.tool_calls]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        turn["name"] = message.name
    return turn


def _written(message: Message) -> str:
    """All that a message brings into a prompt."""
    calls = json.dumps([dict(each) for each in message.tool_calls], ensure_ascii=False)
    return "\n".join((message.content, calls, message.tool_call_id or "", message.name or ""))


class TextStream:
    """Turns one answer's tokens into text, holding back what is not yet a whole character. `silent` tokens
    have no text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, silent: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._silent = silent
        self._decoder = DecodeStream(skip_special_tokens=False)
        self._ids: list[int] = []
        self._text = ""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became complete with these tokens."""
        kept = [token for token in token_ids if token not in self._silent]
        self._ids += kept
        backend = self._tokenizer.backend_tokenizer
        text = "".join(self._decoder.step(backend, token) or "" for token in kept)
        self._text += text
        return text

    def finish(self) -> str:
        """What was still held back: an answer cut inside a character ends with U+FFFD."""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=False)
        assert isinstance(whole, str), type(whole)
        if not whole.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""  # nothing is held back but the pieces of a character
        assert whole.startswith(self._text), (whole, self._text)
        return whole[len(self._text) :]
