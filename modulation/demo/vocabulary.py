"""The demo model's tokenizer: byte-level BPE with ChatML turns.

Knows text and tokens; knows nothing of the model. Any text can be encoded, byte by byte at worst.
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from modulation.demo.corpus import Dialogue

VOCABULARY_SIZE = 1536
MAX_POSITIONS = 2048
PAD, TURN_START, TURN_END = "<|pad|>", "<|im_start|>", "<|im_end|>"
IGNORED_LABEL = -100

# ChatML; tools in the manner of Hermes and Qwen.
CHAT_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\n' }}
{%- if messages and messages[0]['role'] in ['system', 'developer'] %}
{{- messages[0]['content'] + '\n\n' }}
{%- endif %}
{{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
{{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n' }}
{%- for tool in tools %}
{{- tool | tojson + '\n' }}
{%- endfor %}
{{- '</tools>\n\nFor each function call, return a json object with function name and arguments ' }}
{{- 'within <tool_call></tool_call> XML tags:\n<tool_call>\n' }}
{{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message['role'] not in ['system', 'developer', 'user', 'assistant', 'tool'] %}
{{- raise_exception("Role '" + message['role'] + "' is unknown; accepted: system, developer, \
user, assistant, tool.") }}
{%- endif %}
{%- set role = 'system' if message['role'] == 'developer' else message['role'] %}
{%- if tools and loop.first and role == 'system' %}
{%- elif role == 'assistant' and message['tool_calls'] %}
{{- '<|im_start|>assistant\n' + (message['content'] + '\n' if message['content'] else '') }}
{%- for call in message['tool_calls'] %}
{{- '<tool_call>\n{"name": ' + call['function']['name'] | tojson + ', "arguments": ' }}
{{- call['function']['arguments'] | tojson + '}\n</tool_call>' + ('' if loop.last else '\n') }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif role == 'tool' %}
{{- '<|im_start|>tool\n<tool_response>\n' + message['content'] + '\n</tool_response><|im_end|>\n' }}
{%- else %}
{{- '<|im_start|>' + role + '\n' + message['content'] + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}"""


def train_tokenizer(dialogues: Iterable[Dialogue]) -> PreTrainedTokenizerFast:
    """Learn the vocabulary from dialogues; the same dialogues give the same tokenizer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"{message['role']}\n{message['content']}\n" for dialogue in dialogues for message in dialogue)
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        model_max_length=MAX_POSITIONS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode_dialogue(tokenizer: PreTrainedTokenizerFast, dialogue: Dialogue) -> tuple[list[int], list[int]]:
    """Token ids as the chat template gives them, and labels: the assistant's words and turn ends,
    everything else IGNORED_LABEL. Both have one entry a token."""
    ids: list[int] = []
    labels: list[int] = []
    for message in dialogue:
        learned = message["role"] == "assistant"
        parts = (
            (f"{TURN_START}{message['role']}\n", False),
            (f"{message['content']}{TURN_END}", learned),
            ("\n", False),
        )
        for text, is_label in parts:
            tokens = tokenizer.encode(text, add_special_tokens=False)
            ids += tokens
            labels += tokens if is_label else [IGNORED_LABEL] * len(tokens)
    return ids, labels
