"""A run's frozen encoder and its feature stores: which ones it needs, where, and of what."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from megaegpt.config import ModelConfig, RunConfig
from megaegpt.config.arithmetic import arithmetic_digest
from megaegpt.data.features.contents import ChunkContents, EncodedChunks
from megaegpt.data.features.store import FeatureSpec, FeatureStore
from megaegpt.data.features.writer import compute_store
from megaegpt.data.tokens.stream import TokenStream
from megaegpt.errors import ConfigError
from megaegpt.interop.sources import resolve_weights_source, source_config
from megaegpt.model.encoder import FrozenEncoder
from megaegpt.model.initialization import initialization_problems
from megaegpt.model.weights import read_weights_config
from megaegpt.parallel.grid import ProcessGrid
from megaegpt.parallel.together import broadcast_object, raising_together
from megaegpt.precision import DTYPES, Precision
from megaegpt.training.consistency import check_ranks_agree, weights_facts
from megaegpt.training.run_lock import locked_folders

_KEY = "model.encoder.source"


def find_encoder(config: RunConfig) -> ModelConfig | None:
    """The architecture of the encoder, if it is known on this machine; None for a gpt.

    Raises:
        ConfigError: the encoder does not fit the decoder.
        CheckpointError: there are no weights at ``model.encoder.source``.
    """
    if not config.model.needs_encoder:
        return None
    source = _source(config)
    return _fitting_encoder(config.model, source_config(source, _KEY), source)


def load_encoder(
    config: RunConfig, grid: ProcessGrid, precision: Precision
) -> FrozenEncoder | None:
    """The frozen encoder on this rank's device, in the training precision; None for a gpt.

    Collective over all ranks.

    Raises:
        ConfigError: the encoder does not fit the decoder.
        CheckpointError: there are no weights at ``model.encoder.source``, nor a model of its name.
        LaunchError: ranks find different ones there.
    """
    if not config.model.needs_encoder:
        return None
    folder = resolve_weights_source(_source(config), grid, key=_KEY)
    check_ranks_agree(lambda: weights_facts(_KEY, folder), grid)
    with raising_together(grid):
        _fitting_encoder(config.model, read_weights_config(folder)[0], str(folder))
    source = dataclasses.replace(config.model.encoder, source=str(folder))
    encoder = FrozenEncoder.from_source(source, grid, DTYPES[precision])
    encoder.gpt.stack.sequence_parallel = config.parallel.sequence_parallel
    return encoder


def _source(config: RunConfig) -> str:
    source = config.model.encoder.source
    if source is None:
        raise ConfigError("model.encoder.source is not set: give the folder of a GPT's weights")
    return source


def _fitting_encoder(model: ModelConfig, encoder: ModelConfig, source: str) -> ModelConfig:
    problems = []
    if encoder.needs_encoder:
        problems.append(f"it is a {encoder.kind}, not a gpt")
    if encoder.hidden_size != model.hidden_size:
        problems.append(f"its hidden_size is {encoder.hidden_size}, model's {model.hidden_size}")
    if encoder.vocab_size != model.vocab_size:
        problems.append(f"its vocab_size is {encoder.vocab_size}, model's {model.vocab_size}")
    if encoder.max_seq_len < model.egpt.chunk_size + model.encoder.overlap:
        overlap = f" and an overlap of {model.encoder.overlap}" if model.encoder.overlap else ""
        problems.append(
            f"it sees {encoder.max_seq_len} tokens, a chunk has {model.egpt.chunk_size}{overlap}"
        )
    layers = model.encoder.layers or encoder.num_layers
    if layers > encoder.num_layers:
        problems.append(f"it has {encoder.num_layers} blocks, model.encoder.layers is {layers}")
    if model.encoder.initialize_decoder:
        problems += initialization_problems(model, encoder)
    if problems:
        raise ConfigError(f"model.encoder.source={source} does not fit: {'; '.join(problems)}")
    return dataclasses.replace(encoder, num_layers=layers)


def needs_store(config: RunConfig) -> bool:
    """Whether the run reads features from disk."""
    data, model = config.data, config.model
    history = model.has_history and data.history_features == "stored"
    return history or (model.needs_encoder and data.token_features == "stored")


def store_folder(config: RunConfig, split: str) -> Path:
    """Where the store of ``train``, ``validation`` or ``validation_NAME`` is."""
    beside_checkpoints = Path(config.checkpoint.directory).parent / "features"
    return Path(config.data.features or beside_checkpoints) / split


def store_spec(
    config: RunConfig,
    encoder: FrozenEncoder,
    stream: TokenStream,
    split: str,
    precision: Precision,
) -> FeatureSpec:
    """Make the spec of the store over ``stream`` that the run needs.

    Training draws whole chunks. An evaluation goes to the end of its text: of tokens' states those
    of its last, partial chunk are stored too, without which every evaluation would encode it.
    """
    egpt, dtype = config.model.egpt, config.data.feature_dtype
    if dtype == "auto":
        dtype = "bfloat16" if precision == "bf16" else "float32"
    num_chunks = len(stream) // egpt.chunk_size
    if config.data.token_features == "stored" and split != "train":
        num_chunks = -(-(len(stream) - 1) // egpt.chunk_size)  # the last token predicts nothing
    return FeatureSpec(
        encoder=encoder.fingerprint,
        encoder_arithmetic=arithmetic_digest(encoder.config),
        shards=stream.fingerprint,
        num_chunks=num_chunks,
        chunk_size=egpt.chunk_size,
        hidden_size=encoder.config.hidden_size,
        dtype=dtype,
        token_states=config.data.token_features == "stored",
        overlap=config.model.encoder.overlap,
        computed=precision,
    )


def prepare_store(
    config: RunConfig,
    grid: ProcessGrid,
    encoder: FrozenEncoder,
    stream: TokenStream,
    split: str,
    precision: Precision,
) -> FeatureStore:
    """Open the store of a split, computing what is missing of it. Collective over all ranks.

    Several runs may read one store, and one at a time writes it.

    Raises:
        FolderInUseError: it is not complete, and another process is writing it.
        DataError: it is of something else, damaged, or cannot be written.
    """
    spec = store_spec(config, encoder, stream, split, precision)
    contents = EncodedChunks(spec, stream, encoder)
    folder = store_folder(config, split)
    return write_or_open(config, folder, spec, contents, grid, what=f"{split} features")


def write_or_open(
    config: RunConfig,
    folder: Path,
    spec: FeatureSpec,
    contents: ChunkContents,
    grid: ProcessGrid,
    what: str,
) -> FeatureStore:
    """Open a store that may have to be computed, or completed, before. Collective over all ranks.

    Raises:
        FolderInUseError, DataError: see :func:`prepare_store`.
    """
    if grid.is_main and not FeatureStore.exists(folder):
        size = f"{spec.num_bytes / 2**20:,.1f} MiB"
        print(f"{what}: {spec.num_chunks:,} chunks -> {folder} ({size})", flush=True)
    complete = broadcast_object(lambda: FeatureStore.exists(folder), grid)
    remedy = "let it end, its features are for this run too"
    with contextlib.nullcontext() if complete else locked_folders([folder], grid, remedy):
        return compute_store(
            folder,
            spec,
            contents,
            grid,
            batch_size=config.model.encoder.batch_size,
            title=what,
            verify=config.data.verify_checksums,
        )
