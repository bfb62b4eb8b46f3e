"""Chat templates by name, for tokenizers that bring none of their own."""

from __future__ import annotations

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""OpenAI's Chat Markup Language, as Qwen, SmolLM2 and many others use it."""

_LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% endif %}"
)
"""Llama 3's (Meta, "Llama 3 model card and prompt formats", 2024)."""

_ALPACA = (
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}"
    "{% else %}Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.{% endif %}"
    "{{ '\\n\\n' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
    "{% elif not loop.first %}"
    "{{ raise_exception('a system message must be the first one') }}"
    "{% endif %}"
    "{% endfor %}"
)
"""Alpaca's prompt (Taori et al., "Stanford Alpaca", 2023), turn after turn."""

NAMED_TEMPLATES = {"chatml": _CHATML, "llama3": _LLAMA3, "alpaca": _ALPACA}
"""Source of each template by the name that a configuration gives it."""
