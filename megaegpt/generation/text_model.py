"""A trained model that is asked with text and answers with text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megaegpt.config import GenerationConfig
from megaegpt.errors import ConfigError
from megaegpt.generation.generator import TextAssembler, TextGenerator
from megaegpt.generation.trained import LoadedModel
from megaegpt.model.egpt.held_tokens import AS_IN_TRAINING, KEY_TYPES, KeyType, MemoryLimits


@dataclass(frozen=True)
class TextModel:
    """What :func:`megaegpt.api.load` returns."""

    loaded: LoadedModel
    """The model, its tokenizer, and the encoder of an EGPT or DeepGPT."""

    def generate(
        self,
        text: str,
        max_new_tokens: int = 256,
        *,
        temperature: float = 0.8,
        top_k: int | None = 200,
        top_p: float | None = None,
        seed: int = 1337,
        memory_tokens: int | None = None,
        memory_dtype: KeyType | None = None,
    ) -> str:
        """What follows ``text``, without it; it ends at ``max_new_tokens``, or where the model ends
        the document.

        Args:
            text: "" begins a document.
            max_new_tokens: most that are written.
            temperature: divides the logits; 0 always takes the likeliest token.
            top_k: draw among the k likeliest tokens only; None: among all.
            top_p: draw among the fewest tokens that hold this probability; None: among all.
            seed: of the draws; the same gives the same text.
            memory_tokens: of an EGPT with ``token_memory``: tokens of earlier chunks that it holds,
                the newest; None: as many as a training window shows.
            memory_dtype: of their keys; None: the model's.

        Raises:
            ConfigError: a number is out of range, or the model has no token memory.
            NotFiniteError: the model gives no probabilities.
        """
        return "".join(
            self.stream(
                text,
                max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                memory_tokens=memory_tokens,
                memory_dtype=memory_dtype,
            )
        )

    def stream(
        self,
        text: str,
        max_new_tokens: int = 256,
        *,
        temperature: float = 0.8,
        top_k: int | None = 200,
        top_p: float | None = None,
        seed: int = 1337,
        memory_tokens: int | None = None,
        memory_dtype: KeyType | None = None,
    ) -> Iterator[str]:
        """Yield the pieces of :meth:`generate`'s text as they are drawn, none of them empty."""
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
        )
        tokenizer = self.loaded.tokenizer
        limits = self._limits(memory_tokens, memory_dtype)
        generator = TextGenerator(
            self.loaded.model, self.loaded.encoder, tokenizer.vocab_size, limits=limits
        )
        assembler = TextAssembler(tokenizer)
        prompt = tokenizer.encode_prompt(text)
        for token in generator.stream(prompt, config, stop=tokenizer.end_tokens):
            if piece := assembler.add(token):
                yield piece
        if piece := assembler.end():
            yield piece

    def _limits(self, tokens: int | None, dtype: KeyType | None) -> MemoryLimits:
        limits = MemoryLimits(tokens, dtype)
        if tokens is not None and tokens < 1:
            raise ConfigError(f"memory_tokens must be at least 1, not {tokens}")
        if dtype is not None and dtype not in KEY_TYPES:
            raise ConfigError(f"memory_dtype must be one of {', '.join(KEY_TYPES)}, not {dtype}")
        if limits != AS_IN_TRAINING and getattr(self.loaded.model, "token_memory", None) is None:
            raise ConfigError("memory_tokens and memory_dtype are for an egpt with token_memory")
        return limits
