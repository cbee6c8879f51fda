"""Between messages and tokens: chat template in, text out as it becomes complete.

Knows a tokenizer. Knows nothing of models, batches or requests.
"""

from collections.abc import Collection, Sequence

from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

from server.engines.base import Message, PromptError


class ChatText:
    """A tokenizer with a chat template, as the engines use it. `stop_ids` end an answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.stop_ids = frozenset(stop_ids)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The prompt's tokens, ending where the assistant's answer begins.

        Raises:
            PromptError: no messages, a control token in one of them, or the model's chat template
                refuses them.
        """
        if not messages:
            raise PromptError("The conversation has no messages; send at least one.")
        self._refuse_control_tokens(messages)
        turns = [
            # Chat templates know "system"; "developer" is OpenAI's newer name for the same.
            {"role": "system" if each.role == "developer" else each.role, "content": each.content}
            for each in messages
        ]
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise PromptError(f"The model's chat template refuses these messages: {error}") from error
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _refuse_control_tokens(self, messages: Sequence[Message]) -> None:
        """A control token in a message would be read as one: a user could write the assistant's turn."""
        for number, message in enumerate(messages):
            for token in self._control:
                if token in message.content:
                    raise PromptError(
                        f"Message {number} contains {token!r}, a control token of this model. Take it "
                        "out, or break it up, for example with a space."
                    )

    def stream(self) -> "TextStream":
        """A new stream that turns one answer's tokens into text."""
        return TextStream(self._tokenizer, self.stop_ids)


class TextStream:
    """Turns one answer's tokens into text, holding back what is not yet a whole character."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._text = ""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that became complete with these tokens; stop tokens have none."""
        kept = [token for token in token_ids if token not in self._stop_ids]
        self._ids += kept
        backend = self._tokenizer.backend_tokenizer
        text = "".join(self._decoder.step(backend, token) or "" for token in kept)
        self._text += text
        return text

    def finish(self) -> str:
        """What was still held back: an answer cut inside a character ends with U+FFFD."""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        assert isinstance(whole, str), type(whole)
        if not whole.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""  # nothing is held back but the pieces of a character
        assert whole.startswith(self._text), (whole, self._text)
        return whole[len(self._text) :]
