"""Chat templates with the habits of families of models, and tokenizers that have the control tokens of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PLAIN = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# the assistant's part says so itself
BLOCKS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# the system's words stand in the first turn of the user; no header before the assistant; blanks are trimmed
FOLDED = (
    "{% set ns = namespace(system='') %}{% if messages[0]['role'] == 'system' %}"
    "{% set ns.system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}"
    "{% set text = ns.system + m['content'] if loop.first else m['content'] %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)

# headers of several tokens, a date, tools as JSON in the first turn, results as JSON texts, two ends of a turn
HEADERS = (
    "{{ bos_token }}{% if not tools is defined %}{% set tools = none %}{% endif %}"
    "{% macro head(role) %}{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}{% endmacro %}"
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "{{ head('system') + 'Today is ' + strftime_now('%Y') + '.\n\n' + system + '<|eot_id|>' }}"
    "{% for m in messages %}{% if m.role == 'tool' %}{{ head('ipython') }}{{ m.content | tojson }}{{ '<|eot_id|>' }}"
    "{% elif m.tool_calls %}{{ head('assistant') }}{% set call = m.tool_calls[0].function %}"
    "{{ '<|python_tag|>{\"name\": \"' + call.name + '\", \"parameters\": ' }}{{ call.arguments | tojson }}{{ '}<|eom_id|>' }}"
    "{% else %}{{ head(m.role) }}{% if loop.first and tools is not none %}{{ tools | tojson(indent=4) + '\n\n' }}{% endif %}"
    "{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ head('assistant') }}{% endif %}"
)

# tools stand before the last turn of the user, wherever that is
MOVED = (
    "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{% if tools is not none and m == users[-1] %}{{ '[AVAILABLE_TOOLS] ' }}{{ tools | tojson }}"
    "{{ '[/AVAILABLE_TOOLS]' }}{% endif %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.tool_calls is defined %}{{ '[TOOL_CALLS] [' }}{% for call in m.tool_calls %}{{ call.function | tojson }}"
    "{{ ', ' if not loop.last }}{% endfor %}{{ ']' + eos_token }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] {\"content\": ' }}{{ m.content | tojson }}{{ '}[/TOOL_RESULTS]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
)

# what was thought stays in the last turn only, which has an empty thought where there was none
THINKING = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' and not m.content.startswith('<tool_response>') %}"
    "{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{% if m.role == 'assistant' %}{% set text = m.content or '' %}{% set thought = '' %}"
    "{% if '</think>' in text %}{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ text }}"
    "{% for call in m.tool_calls or [] %}{{ '\n<tool_call>\n' }}{{ call.function | tojson }}{{ '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# nothing ends a turn but who speaks next
OPEN = (
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

ENDED = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

# name -> template, its control tokens (the first is bos, the second eos), those at which the model stops
FAMILIES: dict[str, tuple[str, list[str], list[str]]] = {
    "plain": (PLAIN, ["<|im_start|>", "<|im_end|>", "<|endoftext|>"], ["<|im_end|>"]),
    "blocks": (BLOCKS, ["<|im_start|>", "<|im_end|>"], ["<|im_end|>"]),
    "folded": (FOLDED, ["<s>", "</s>"], ["</s>"]),
    "headers": (
        HEADERS,
        ["<|begin_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"],
        ["<|eom_id|>", "<|eot_id|>"],
    ),
    "moved": (
        MOVED,
        *(
            [
                "<s>",
                "</s>",
                "[INST]",
                "[/INST]",
                "[AVAILABLE_TOOLS]",
                "[/AVAILABLE_TOOLS]",
                "[TOOL_CALLS]",
                "[TOOL_RESULTS]",
                "[/TOOL_RESULTS]",
            ],
        ),
        ["</s>"],
    ),
    "thinking": (THINKING, ["<|im_start|>", "<|im_end|>"], ["<|im_end|>"]),
    "open": (OPEN, ["[gMASK]", "<|endoftext|>", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"], ["<|endoftext|>", "<|user|>"]),
    "ended": (ENDED, ["<s>", "<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"], ["<|endoftext|>", "<|end|>"]),
}
TAKES_TOOLS = ("headers", "moved", "thinking")
NO_SYSTEM = ("moved",)


def make_tokenizer(folder: Path, template: str, control: list[str], ends: list[str], *, blanks: bool = False) -> Any:
    """transformers' tokenizer, saved to `folder`. `blanks`: spelled as SentencePiece does, with a blank before each piece of text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = ["The keeper keeps the key of the tower on a brass hook. Who writes each name in a green book? assistant user system\n\n"]
    if blanks:
        fast = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        singles = ["<unk>", *(f"<0x{value:02X}>" for value in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=singles, show_progress=False)
    else:
        fast = Tokenizer(models.BPE())
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.post_processor = None
        fast.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator(words * 3, trainer)
    fast.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in control])
    fast.add_tokens([AddedToken(word, special=False, normalized=False) for word in ("<think>", "</think>", "<tool_call>", "</tool_call>")])
    theirs = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token=control[0], eos_token=control[1])
    theirs.chat_template = template
    theirs.save_pretrained(folder)
    stops = {"eos_token_id": [fast.token_to_id(word) for word in ends]}
    (folder / "generation_config.json").write_text(json.dumps(stops), encoding="utf-8")
    return theirs
