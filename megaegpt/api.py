"""MegaEGPT from Python: whole runs and trained models, and a GPT in a loop of one's own.

:func:`pretrain`, :func:`finetune` and :func:`load` are the programs of ``launchers/`` and
``tools/generate.py`` in one process. The other names are the ones small GPT kits use, for plain
tensors and ``torch.utils.data``; behind them are the package's own model, loss and generator. All
are imported from ``megaegpt``, and ``docs/notebooks.md`` goes through them.

Runs that are spread over processes belong to ``launchers/pretrain.py``.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from megaegpt.arguments import LARGEST_SEED
from megaegpt.config import GenerationConfig, ModelConfig, RunConfig
from megaegpt.config.loading import config_from_values, load_config, model_config_from_dict
from megaegpt.config.presets import create_model_config
from megaegpt.config.validation import validate, validate_model
from megaegpt.data.instruction.records import InstructionDataset, create_instruction_collate_fn
from megaegpt.data.tokenizer import Tokenizer
from megaegpt.errors import ConfigError, DataError
from megaegpt.generation.generator import TextGenerator
from megaegpt.generation.text_model import TextModel
from megaegpt.generation.trained import load_for_inference
from megaegpt.labels import IGNORE
from megaegpt.model.gpt import GPT
from megaegpt.parallel.devices import local_device
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.params import initialize
from megaegpt.precision import INT8, inference_dtype

__all__ = [
    "GPTModel",
    "InstructionDataset",
    "compute_batch_loss",
    "create_instruction_collate_fn",
    "create_model_config",
    "create_pretraining_dataloader",
    "finetune",
    "generate_text_autoregressive",
    "load",
    "pretrain",
    "text_to_token_ids",
    "token_ids_to_text",
]

_ID_TYPES = (torch.int64, torch.int32)
_CONFIGURATION = "the model's configuration"


def pretrain(
    config: str | Path | Mapping[str, Any] | RunConfig,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
) -> bool:
    """Train a GPT, an EGPT or a DeepGPT as ``launchers/pretrain.py`` does, in this process.

    The run's files are in the folders that the configuration names, and :func:`load` takes either
    of them. Ctrl-C, SIGTERM and SIGUSR1 save and stop; it must be called from the main thread.

    Args:
        config: a YAML file, the name of one that comes with the package (``"gpt_encoder_cpu"``),
            nested mappings of its keys, or a configuration that is made already.
        overrides: ``section.key=value`` texts on top of it; not for the last of these forms.
        resume: go on from the latest checkpoint, if there is one.

    Returns:
        True if the run is complete, False if it was stopped, and saved, before its last step.

    Raises:
        MegaEGPTError: whatever is the user's to fix, in one message.

    Example:
        >>> pretrain({"training": {"stepz": 100}})
        Traceback (most recent call last):
        ...
        megaegpt.errors.ConfigError: ...: training.stepz is not a key; did you mean training.steps?
    """
    from megaegpt.training import pretraining
    from megaegpt.training.launching import start_run

    return start_run(_run_config(config, overrides), pretraining.pretrain, resume)


def finetune(
    config: str | Path | Mapping[str, Any] | RunConfig,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
) -> bool:
    """Teach a trained model to follow instructions, as ``launchers/finetune.py`` does.

    Arguments, result and errors are those of :func:`pretrain`.

    Example:
        >>> finetune({"data": {"instructions": {"train": ["tasks.json"]}}})
        Traceback (most recent call last):
        ...
        megaegpt.errors.ConfigError: training.initialize_from is not set: give a run, ...
    """
    from megaegpt.training import finetuning
    from megaegpt.training.launching import start_run

    return start_run(_run_config(config, overrides), finetuning.finetune, resume)


def _run_config(
    config: str | Path | Mapping[str, Any] | RunConfig, overrides: Sequence[str]
) -> RunConfig:
    if isinstance(config, RunConfig):
        if overrides:
            raise ConfigError("overrides change a file or mappings: use dataclasses.replace here")
        return config
    if isinstance(config, Mapping):
        return config_from_values(config, overrides)
    return load_config(config, overrides)


def load(
    source: str | Path,
    *,
    dtype: Literal["bf16", "fp16", "fp32", "int8"] | None = None,
    encoder: str | None = None,
    vocabulary: str | None = None,
) -> TextModel:
    """A trained model, ready to write: ``load("runs/egpt").generate("Well, Prince,")``.

    Args:
        source: a run's folder (its latest checkpoint), a checkpoint, a folder of weights of ours
            or in Hugging Face's form, a GGUF file, or the name of a model (``"smollm2-135m"``).
        dtype: None: bf16 on a GPU, fp32 on a CPU; ``int8``, on a CPU: matrices of 8 bits and a
            scale for each row, in a quarter of the memory.
        encoder: that of an EGPT or DeepGPT, where it was moved.
        vocabulary: the tokenizer, where none lies with the weights.

    Raises:
        CheckpointError: there is no such model, or it is damaged.
        ConfigError: its description is not valid, or ``encoder`` is given for a gpt.
        DataError: its tokenizer cannot be had.

    Example:
        >>> from megaegpt.model.weights import save_weights
        >>> config = create_model_config("gpt2-small (124M)", num_layers=1, hidden_size=24)
        >>> model = GPTModel(config)
        >>> save_weights(model, "tiny", model.grid)
        >>> text = load("tiny").generate("The capital of", max_new_tokens=5, temperature=0)
        >>> len(text) > 0
        True
    """
    device = local_device()
    loaded = load_for_inference(
        source,
        ProcessGrid(device=device),
        inference_dtype(dtype, device),
        encoder_source=encoder,
        vocabulary=vocabulary,
        int8=dtype == INT8,
    )
    return TextModel(loaded)


class TextTokenizer(Protocol):
    """:class:`~megaegpt.data.tokenizer.Tokenizer`, or tiktoken's ``Encoding``."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ...

    def decode(self, ids: list[int], /) -> str:
        """Text of ids."""
        ...


@functools.cache
def _gpt2_tokenizer() -> Tokenizer:
    return Tokenizer.load()


class GPTModel(GPT):
    """A GPT with initial weights, called like any torch model: ids in, logits out.

    It is a :class:`~megaegpt.model.gpt.GPT` and fits wherever one does; its weights are written
    and read by :mod:`megaegpt.model.weights`.

    Args:
        config: of kind ``gpt``, from :func:`~megaegpt.config.presets.create_model_config`.
        seed: of the initial weights.

    Raises:
        ConfigError: the configuration is that of an EGPT or DeepGPT, or has a value that no model
            has; or the seed is out of range.

    Example:
        >>> config = create_model_config("gpt2-small (124M)", num_layers=2, hidden_size=48)
        >>> model = GPTModel(config)
        >>> model(torch.tensor([[464, 3139]])).shape
        torch.Size([1, 2, 50257])
        >>> model.num_parameters()
        2520384
    """

    def __init__(self, config: ModelConfig, seed: int = 1337) -> None:
        if config.needs_encoder:
            raise ConfigError(
                f"GPTModel is a model of kind gpt, not {config.kind}, which needs an encoder: "
                "see megaegpt.model.build.build_model"
            )
        config = model_config_from_dict(asdict(config), _CONFIGURATION)
        validate_model(config, _CONFIGURATION)
        _check_seed(seed)
        super().__init__(config, ProcessGrid())
        initialize(self, seed, self.grid)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        reduction: Literal["sum", "none"] = "sum",
        segments: Tensor | None = None,
    ) -> Tensor:
        """(B, T) ids -> (B, T, V) logits; with targets (B, T) nats, as of any GPT of the package,
        which never makes the logits and is the way to train.

        Raises:
            DataError: the ids are no batch, or a text without tokens.
        """
        _check_batch(tokens)
        if targets is not None:
            return super().forward(tokens, targets, reduction, segments)
        return self.head.full_logits(self.hidden_states(tokens, segments=segments))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GPTModel:
        """``to("cuda")`` and its like: caches are made where the weights have gone."""
        super()._apply(fn, recurse)
        self.grid = replace(self.grid, device=self.embedding.weight.device)
        return self


def text_to_token_ids(text: str, tokenizer: TextTokenizer | None = None) -> Tensor:
    """A text -> (1, T) int64 ids, a batch of one.

    Args:
        text: all of it is ordinary; ``<|endoftext|>`` is characters like any other.
        tokenizer: None: GPT-2's.

    Example:
        >>> text_to_token_ids("The capital of")
        tensor([[ 464, 3139,  286]])
    """
    tokenizer = tokenizer or _gpt2_tokenizer()
    # tiktoken's encode refuses a text that has the name of a special token in it
    encode = getattr(tokenizer, "encode_ordinary", tokenizer.encode)
    return torch.tensor([encode(text)], dtype=torch.int64)


def token_ids_to_text(token_ids: Tensor, tokenizer: TextTokenizer | None = None) -> str:
    """Ids of one text, (T,) or (1, T) -> the text.

    Raises:
        DataError: several rows, numbers that are no integers, or an id that is outside the
            vocabulary.

    Example:
        >>> token_ids_to_text(torch.tensor([[464, 3139, 286]]))
        'The capital of'
    """
    if token_ids.dim() > 2 or (token_ids.dim() == 2 and token_ids.shape[0] != 1):
        raise DataError(f"ids of shape {tuple(token_ids.shape)} are not one text: give one row")
    if token_ids.numel() and token_ids.dtype not in _ID_TYPES:
        raise DataError(f"ids are integers, not {token_ids.dtype}: give int64 or int32")
    return (tokenizer or _gpt2_tokenizer()).decode(token_ids.flatten().tolist())


def create_pretraining_dataloader(
    text: str,
    batch_size: int = 4,
    max_length: int = 256,
    stride: int | None = None,
    shuffle: bool = True,
    drop_last: bool = True,
    tokenizer: TextTokenizer | None = None,
    seed: int = 1337,
) -> DataLoader:
    """Batches of ``(inputs, targets)``, both (B, ``max_length``) int64; targets are one token on.

    For a text that fits in memory; corpora on disk are read by :mod:`megaegpt.data.tokens.samples`.

    Args:
        text: tokenised at once.
        batch_size: windows in a batch.
        max_length: tokens in a window.
        stride: tokens from one window's start to the next one's; None: ``max_length``, so that
            no token is predicted twice. What is left at the end and fills no window is not used.
        shuffle: draw windows in a random order, another one in each epoch.
        drop_last: leave out a last batch that is not full.
        tokenizer: None: GPT-2's.
        seed: of the order.

    Raises:
        ConfigError: a size or the stride is below 1, or the seed is out of range.
        DataError: the text is shorter than one window, or with ``drop_last`` than one batch.

    Example:
        >>> batches = create_pretraining_dataloader("one two three " * 50, max_length=8)
        >>> inputs, targets = next(iter(batches))
        >>> inputs.shape
        torch.Size([4, 8])
        >>> bool((inputs[:, 1:] == targets[:, :-1]).all())
        True
    """
    stride = max_length if stride is None else stride
    _check_positive(batch_size=batch_size, max_length=max_length, stride=stride)
    _check_seed(seed)
    ids = text_to_token_ids(text, tokenizer)[0]
    windows = _windows(ids, max_length, stride, needed=batch_size if drop_last else 1)
    data = TensorDataset(windows[:, :-1], windows[:, 1:])
    order = torch.Generator().manual_seed(seed)
    return DataLoader(data, batch_size, shuffle, drop_last=drop_last, generator=order)


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ConfigError(f"{name}={size!r} must be a whole number of at least 1")


def _check_seed(seed: int) -> None:
    if type(seed) is not int or not 0 <= seed <= LARGEST_SEED:
        raise ConfigError(f"seed={seed!r} must be a whole number from 0 to {LARGEST_SEED}")


def _windows(ids: Tensor, max_length: int, stride: int, needed: int) -> Tensor:
    """(T,) ids -> (windows, ``max_length`` + 1), a view; at least ``needed`` of them."""
    if len(ids) <= max_length:
        raise DataError(
            f"the text has {len(ids)} tokens; one window needs max_length + 1 = {max_length + 1}"
        )
    windows = ids.unfold(0, max_length + 1, stride)
    if len(windows) < needed:
        raise DataError(
            f"the text has {len(windows)} windows of max_length={max_length}, not the "
            f"{needed} of one batch, and drop_last leaves out what is less: give a longer "
            "text, a smaller batch_size, or drop_last=False"
        )
    return windows


def compute_batch_loss(
    input_batch: Tensor,
    target_batch: Tensor,
    model: GPT,
    device: torch.device | str | None = None,
) -> Tensor:
    """Mean nats of the batch's predicted tokens: a scalar to call ``backward()`` on.

    Args:
        input_batch: (B, T) ids.
        target_batch: (B, T) ids; -100 is not predicted. With none to predict the loss is 0.
        model: a :class:`GPTModel`, or any GPT of the package.
        device: None: the model's.

    Raises:
        DataError: the ids are no batch, such as those of a text of a single token, which has none
            that follows; or a target is no token, or the shapes differ.

    Example:
        >>> config = create_model_config("gpt2-small (124M)", num_layers=1, hidden_size=24)
        >>> inputs = text_to_token_ids("The capital of France is Paris")
        >>> loss = compute_batch_loss(inputs[:, :-1], inputs[:, 1:], GPTModel(config))
        >>> f"{loss.item():.1f} nats, untrained; ln(50257) = 10.8"
        '10.8 nats, untrained; ln(50257) = 10.8'
    """
    _check_batch(input_batch)
    _check_batch(target_batch)
    device = device or model.embedding.weight.device
    inputs, targets = input_batch.to(device), target_batch.to(device)
    return model(inputs, targets) / (targets != IGNORE).sum().clamp(min=1)


def generate_text_autoregressive(
    model: GPT,
    token_ids: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_token_id: int | None = None,
    seed: int = 1337,
) -> Tensor:
    """Continue each row of (B, T) ids: (B, T + n), n <= ``max_new_tokens``, on the ids' device.

    The model's mode, training or not, is put back. Rows draw independently of each other.

    Args:
        model: a :class:`GPTModel`, or any GPT of the package.
        token_ids: at least one prompt of at least one token, all of one length.
        max_new_tokens: most that are added.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: draw among the k likeliest only; None: among all.
        eos_token_id: ends a row and fills it up while others go on (GPT-2: 50256); None: no id.
        seed: of the draws, row r's is ``seed + r``.

    Raises:
        ConfigError: a number is out of range.
        DataError: prompts are none, empty or of several lengths, or an id is not the model's.
        NotFiniteError: the model gives no probabilities.

    Example:
        >>> config = create_model_config("gpt2-small (124M)", num_layers=1, hidden_size=24)
        >>> prompt = text_to_token_ids("The capital of")
        >>> ids = generate_text_autoregressive(
        ...     GPTModel(config), prompt, max_new_tokens=5, temperature=0.8, top_k=50
        ... )
        >>> ids.shape
        torch.Size([1, 8])
        >>> token_ids_to_text(ids).startswith("The capital of")
        True
    """
    prompts = _prompts(token_ids, model.config.vocab_size)
    sampling = GenerationConfig(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed
    )
    validate(RunConfig(generation=sampling))
    if eos_token_id is not None and eos_token_id not in range(model.config.vocab_size):
        raise ConfigError(
            f"eos_token_id={eos_token_id!r} is not one of the model's {model.config.vocab_size} "
            "ids, and would end no text"
        )
    with _in_eval_mode(model):
        ends = () if eos_token_id is None else (eos_token_id,)
        rows = TextGenerator(model).generate(prompts.tolist(), sampling, stop=ends)
    return torch.cat([prompts, _filled_up(rows, eos_token_id or 0).to(prompts)], dim=1)


@contextlib.contextmanager
def _in_eval_mode(model: GPT) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _filled_up(rows: list[list[int]], fill: int) -> Tensor:
    """Rows of ids -> (B, longest) int64, the shorter ones filled up at their ends."""
    longest = max(map(len, rows))
    filled = [row + [fill] * (longest - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.int64).view(len(rows), longest)


def _check_batch(token_ids: Tensor) -> None:
    """Refuse what is not (B, T) ids, before it is an error deep inside or a loss of nothing."""
    if token_ids.dim() != 2 or token_ids.numel() == 0 or token_ids.dtype not in _ID_TYPES:
        kind = str(token_ids.dtype).removeprefix("torch.")
        raise DataError(
            f"{kind} of shape {tuple(token_ids.shape)} is no batch: give integer ids (int64 or "
            "int32), (rows, tokens), at least one of each"
        )


def _prompts(token_ids: Tensor | Sequence[Sequence[int]], vocab_size: int) -> Tensor:
    """Prompts as (B, T) ids."""
    try:
        prompts = torch.as_tensor(token_ids)
    except (ValueError, OverflowError) as error:
        if "at dim" in str(error):
            message = "the prompts have different lengths: continue them one by one"
            raise DataError(message) from None
        raise DataError(f"the prompts are no token ids: {error}") from None
    if prompts.numel() and prompts.dtype not in _ID_TYPES:
        kind = str(prompts.dtype).removeprefix("torch.")
        raise DataError(f"the prompts are {kind}: give ids as int64 or int32")
    if prompts.dim() != 2 or prompts.numel() == 0:
        raise DataError(
            f"ids of shape {tuple(prompts.shape)} are no prompts: give (rows, tokens), at least "
            "one of each; a text from nothing starts from the end-of-text token"
        )
    least, most = int(prompts.min()), int(prompts.max())
    if least < 0 or most >= vocab_size:
        raise DataError(
            f"the prompts have the id {least if least < 0 else most}, and the model's are 0 to "
            f"{vocab_size - 1}"
        )
    return prompts
