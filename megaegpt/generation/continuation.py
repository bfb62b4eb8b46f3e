"""Prompts that grow: what one has in common with the text before it is not read again."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from megaegpt.config import GenerationConfig
from megaegpt.generation.sampling import Sampler, check_drawn, check_sampling
from megaegpt.model.build import Model, new_decoder
from megaegpt.model.decoding import Decoder
from megaegpt.model.egpt.held_tokens import AS_IN_TRAINING, MemoryLimits
from megaegpt.model.encoder import FrozenEncoder


class Continuation:
    """Continues one prompt after another, such as those of a conversation turn by turn.

    The tokens are those of a :class:`~megaegpt.generation.generator.TextGenerator`.

    Args:
        model: in eval mode, not cut over ranks.
        encoder: of an EGPT or DeepGPT.
        vocab_size: ids from here on are never drawn.
        limits: of what an EGPT's token memory holds of a text.
        max_tokens: most of a prompt and what continues it, for which a GPT's memory is taken, but
            for no more than it sees.
    """

    def __init__(
        self,
        model: Model,
        encoder: FrozenEncoder | None,
        vocab_size: int,
        limits: MemoryLimits = AS_IN_TRAINING,
        max_tokens: int = sys.maxsize,
    ) -> None:
        self._model, self._encoder, self._limits = model, encoder, limits
        self._vocab_size, self._max_tokens = vocab_size, max_tokens
        self._decoder: Decoder | None = None
        self._read: list[int] = []

    def stream(
        self,
        prompt: Sequence[int],
        config: GenerationConfig,
        *,
        stop: Collection[int] = (),
        seed: int | None = None,
    ) -> Iterator[int]:
        """Yield up to ``config.max_new_tokens`` tokens that continue ``prompt``, which has at least
        one; each of ``stop`` ends them and is not part of them. It may be left at any time.

        Args:
            seed: in place of ``config.seed``.

        Raises:
            ConfigError: a value or the seed is out of range.
            NotFiniteError: the model gives no probabilities.
            ValueError: these are more than ``max_tokens``.
        """
        if len(prompt) + config.max_new_tokens > self._max_tokens:
            raise ValueError(
                f"{len(prompt)} and {config.max_new_tokens} tokens are more than {self._max_tokens}"
            )
        seeds = [config.seed if seed is None else seed]
        check_sampling(config, seeds)
        device = self._model.grid.device
        sampler = Sampler(config, seeds, device)
        decoder, new = self._take_decoder(prompt)
        for _ in range(config.max_new_tokens):
            # What interrupts a step leaves a decoder behind that must not be used again.
            self._decoder = None
            logits = _advance(decoder, torch.tensor([new], device=device))
            token = int(sampler.draw(logits[:, : self._vocab_size]))
            check_drawn([token])
            self._decoder, self._read = decoder, [*self._read, *new]
            if token in stop:
                return
            yield token
            new = [token]

    def _take_decoder(self, prompt: Sequence[int]) -> tuple[Decoder, list[int]]:
        """A decoder that has read a beginning of ``prompt``, possibly none, and the rest."""
        read = len(self._read)
        if self._decoder is not None and read < len(prompt) and [*prompt[:read]] == self._read:
            return self._decoder, [*prompt[read:]]
        self._decoder, self._read = None, []  # before a new one takes memory
        model, encoder, limits = self._model, self._encoder, self._limits
        return new_decoder(model, encoder, 1, self._max_tokens, limits=limits), [*prompt]


@torch.inference_mode()
def _advance(decoder: Decoder, tokens: Tensor) -> Tensor:
    return decoder.advance(tokens)
