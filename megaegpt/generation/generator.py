"""Text out of a trained model, token by token.

Example:
    >>> loaded = load_for_inference("runs/egpt/checkpoints", ProcessGrid())
    >>> generator = TextGenerator(loaded.model, loaded.encoder)
    >>> for token in generator.stream(loaded.tokenizer.encode("Well, Prince,"), config): ...
"""

from __future__ import annotations

import codecs
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megaegpt.config import GenerationConfig
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.errors import NotFiniteError
from megaegpt.generation.compiled import CompiledSteps
from megaegpt.generation.padded import PaddedGPTDecoder
from megaegpt.generation.recomputing import RecomputingDecoder
from megaegpt.generation.sampling import Sampler, check_drawn, check_sampling
from megaegpt.model.build import Model, gpt_of, new_decoder
from megaegpt.model.decoding import Decoder
from megaegpt.model.egpt.held_tokens import AS_IN_TRAINING, MemoryLimits
from megaegpt.model.encoder import FrozenEncoder


class TextGenerator:
    """Continues prompts with a GPT, an EGPT or a DeepGPT.

    All methods are collective over the ranks of a tensor-parallel group: each calls them with the
    same arguments and gets the same tokens.

    Args:
        model: in eval mode, on its grid's device.
        encoder: of an EGPT or DeepGPT.
        vocab_size: ids from here on are never drawn (a model may have more than its tokenizer).
        compiled: one token's way through the GPT (of an EGPT or DeepGPT, the encoder) is compiled,
            which takes its time with the first text of a batch size and of a length, and on CUDA
            recorded as a graph; :func:`~megaegpt.generation.compiled.uncompilable` says what cannot
            be.
        limits: of what an EGPT's token memory holds of a text.
    """

    def __init__(
        self,
        model: Model,
        encoder: FrozenEncoder | None = None,
        vocab_size: int | None = None,
        *,
        compiled: bool = False,
        limits: MemoryLimits = AS_IN_TRAINING,
    ) -> None:
        self._model, self._encoder, self._limits = model, encoder, limits
        self._steps = None
        if compiled:
            self._steps = CompiledSteps(gpt_of(model, encoder), with_head=encoder is None)
        self._vocab_size = vocab_size or model.config.vocab_size

    def stream(
        self,
        prompt: Sequence[int],
        config: GenerationConfig,
        *,
        stop: Collection[int] = (),
        use_cache: bool = True,
    ) -> Iterator[int]:
        """Yield up to ``config.max_new_tokens`` tokens that continue ``prompt`` as they are drawn.

        Each of ``stop`` ends the text and is not part of it. ``use_cache=False`` computes every
        token from the beginning; the tokens are the same.
        """
        for (token,) in self.stream_batch([prompt], config, stop=stop, use_cache=use_cache):
            assert token is not None  # a batch ends when all its rows have
            yield token

    def stream_batch(
        self,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        *,
        stop: Collection[int] = (),
        use_cache: bool = True,
        seeds: Sequence[int] | None = None,
    ) -> Iterator[list[int | None]]:
        """Yield the next token of each prompt at a time, None where its text has ended.

        The prompts of a GPT are run as one batch, shorter ones padded on the left, also past a full
        context. Those of other models, of compiled steps and without a cache are run in one batch
        for each length: chunks begin at the first token, compiled steps have the same columns.

        Row r draws with a seed of its own, so it becomes what it would become by itself with that
        seed (up to the rounding of products of another size).

        Args:
            prompts: at least one token each.
            config: its ``prompt`` is not read.
            stop: ids, each of which ends a text and is not part of it.
            use_cache: False computes every token from the beginning; the tokens are the same.
            seeds: one a row, in place of ``config.seed + r``.

        Raises:
            ConfigError: a value or a seed is out of range, or memory is too small for the cache.
            NotFiniteError: the model gives no probabilities.
        """
        seeds = range(config.seed, config.seed + len(prompts)) if seeds is None else seeds
        self._check(prompts, config, seeds)
        groups = self._batches(prompts, use_cache)
        streams = [
            self._stream_rows(
                [prompts[r] for r in rows], [seeds[r] for r in rows], config, stop, use_cache
            )
            for rows in groups
        ]
        for _ in range(config.max_new_tokens):
            step: list[int | None] = [None] * len(prompts)
            for rows, stream in zip(groups, streams, strict=True):
                for row, token in zip(rows, next(stream, ()), strict=False):
                    step[row] = token
            if all(token is None for token in step):
                return
            yield step

    def _check(
        self, prompts: Sequence[Sequence[int]], config: GenerationConfig, seeds: Sequence[int]
    ) -> None:
        if self._model.training:
            raise ValueError("the model is in training mode, with dropout: call model.eval()")
        check_sampling(config, seeds)
        for row, prompt in enumerate(prompts):
            if len(prompt) == 0:
                raise ValueError(f"prompt {row} has no tokens: start from the end-of-text token")

    def _batches(self, prompts: Sequence[Sequence[int]], use_cache: bool) -> list[list[int]]:
        """The numbers of the prompts that are run together."""
        pads = not self._model.config.needs_encoder and use_cache and self._steps is None
        if pads and prompts:
            return [list(range(len(prompts)))]
        rows_of_length = defaultdict(list)
        for row, prompt in enumerate(prompts):
            rows_of_length[len(prompt)].append(row)
        return list(rows_of_length.values())

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        config: GenerationConfig,
        *,
        stop: Collection[int] = (),
        use_cache: bool = True,
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """The tokens that :meth:`stream_batch` yields, by prompt."""
        texts: list[list[int]] = [[] for _ in prompts]
        steps = self.stream_batch(prompts, config, stop=stop, use_cache=use_cache, seeds=seeds)
        for step in steps:
            for text, token in zip(texts, step, strict=True):
                if token is not None:
                    text.append(token)
        return texts

    def _stream_rows(
        self,
        prompts: list[Sequence[int]],
        seeds: list[int],
        config: GenerationConfig,
        stop: Collection[int],
        use_cache: bool,
    ) -> Iterator[list[int | None]]:
        """:meth:`stream_batch` for the prompts of one batch."""
        device = self._model.grid.device
        decoder = self._new_decoder(prompts, config.max_new_tokens, use_cache)
        sampler = Sampler(config, seeds, device)
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        tokens = torch.tensor(padded, device=device)  # (B, T)
        running = [True] * len(prompts)
        while True:
            drawn = self._next_tokens(decoder, sampler, tokens)
            ids = drawn.tolist()  # the only wait for the device
            check_drawn(ids)
            running = [on and token not in stop for on, token in zip(running, ids, strict=True)]
            if not any(running):
                return
            yield [token if on else None for on, token in zip(running, ids, strict=True)]
            tokens = drawn.unsqueeze(1)  # (B, 1)

    def _new_decoder(
        self, prompts: list[Sequence[int]], max_new_tokens: int, use_cache: bool
    ) -> Decoder:
        lengths = [len(prompt) for prompt in prompts]
        if len(set(lengths)) > 1:
            gpt = gpt_of(self._model, self._encoder)  # see _batches
            return PaddedGPTDecoder(gpt, lengths, max_new_tokens)
        if not use_cache:
            return RecomputingDecoder(self._model, self._encoder)
        length = lengths[0] + max_new_tokens
        return new_decoder(
            self._model, self._encoder, len(prompts), length, self._steps, self._limits
        )

    @torch.inference_mode()
    def _next_tokens(self, decoder: Decoder, sampler: Sampler, tokens: Tensor) -> Tensor:
        """Feed (B, T) tokens, draw the next: (B,)."""
        logits = decoder.advance(tokens)  # (B, V)
        return sampler.draw(logits[:, : self._vocab_size])


class TextAssembler:
    """Tokens to text as they come: a character whose bytes lie in several tokens comes out whole,
    with the last of them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, *tokens: int) -> str:
        """The text completed by ``tokens``; bytes that are no UTF-8 become U+FFFD."""
        return self._decoder.decode(self._tokenizer.decode_bytes(tokens))

    def end(self) -> str:
        """Return U+FFFD for a character that was cut off at the end, else the empty string."""
        return self._decoder.decode(b"", final=True)


class Prompt(NamedTuple):
    """What a sample text begins with."""

    text: str
    """As it is shown."""
    ids: list[int]
    stop: frozenset[int]
    """Tokens that end the text."""


def sample_text(
    model: Model,
    encoder: FrozenEncoder | None,
    tokenizer: Tokenizer,
    config: GenerationConfig,
    prompt: Prompt,
) -> str:
    """``prompt`` and its continuation, from a model in training; its mode is put back.

    Collective over the ranks of a tensor-parallel group. Compiled blocks run uncompiled: every
    length of the text would be compiled anew.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            generator = TextGenerator(model, encoder, tokenizer.vocab_size)
            (tokens,) = generator.generate([prompt.ids], config, stop=prompt.stop)
    except NotFiniteError as error:  # what training does then, its own policy says
        return f"{prompt.text}[no text: {error}]"
    finally:
        model.train(was_training)
    return prompt.text + tokenizer.decode(tokens)
