"""The families of Hugging Face's and llama.cpp's models that have a counterpart here."""

from megaegpt.interop.families.family import Family
from megaegpt.interop.families.gpt2 import GPT2
from megaegpt.interop.families.llama import LLAMA
from megaegpt.interop.families.mistral import MISTRAL
from megaegpt.interop.families.olmo2 import OLMO2
from megaegpt.interop.families.qwen2 import QWEN2
from megaegpt.interop.families.qwen3 import QWEN3

FAMILIES: tuple[Family, ...] = (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, OLMO2)

__all__ = ["FAMILIES", "Family"]
