"""Compute the chunk features of an EGPT run, for its training and validation shards.

Training does this by itself where the features are missing; done before, it can have more
processes, or a machine of its own:

    python tools/precompute_features.py --config configs/egpt_war_and_peace.yaml
    deepspeed tools/precompute_features.py --config configs/egpt_war_and_peace.yaml
    torchrun --nproc_per_node 8 tools/precompute_features.py --config X.yaml data.features=/disk

The result does not depend on the number of processes. An interrupted computation goes on where it
stopped when it is started again; features of another encoder, other shards or another chunk size
are refused. With data.token_features=stored every token's state is stored too, and with
data.predictions=stored what a frozen decoder predicts of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from megaegpt.config.run import RunConfig
from megaegpt.errors import ConfigError, exits_cleanly
from megaegpt.training.command_line import RunParser

if TYPE_CHECKING:
    from megaegpt.model.egpt.egpt import EGPT
    from megaegpt.parallel.grid import ProcessGrid


@exits_cleanly
def main() -> None:
    """Compute what is missing, and check what is there if asked."""
    parser = RunParser(__doc__)
    parser.add_argument(
        "--verify", action="store_true", help="compare every file with its checksum"
    )
    arguments, config = parser.parse_run(trains=False)
    _compute(config, arguments.verify)


def _compute(config: RunConfig, verify: bool) -> None:
    from megaegpt.parallel.launch import joined_processes

    with joined_processes(config.parallel.tensor_parallel_size) as grid:
        _compute_together(config, verify, grid)


def _compute_together(config: RunConfig, verify: bool, grid: ProcessGrid) -> None:
    from megaegpt.config.validation_sets import validation_sets
    from megaegpt.data.tokens.corpus_manifest import verify_shards
    from megaegpt.data.tokens.stream import TokenStream
    from megaegpt.data.tokens.token_ids import check_ids
    from megaegpt.parallel.together import raising_together
    from megaegpt.precision import resolve_precision
    from megaegpt.training.consistency import (
        check_ranks_agree,
        configuration_facts,
        corpus_facts,
    )
    from megaegpt.training.feature_stores import load_encoder, prepare_store
    from megaegpt.training.frozen_predictions import FrozenDecoder
    from megaegpt.training.starting_model import starting_model

    check_ranks_agree(lambda: configuration_facts(config), grid)
    with raising_together(grid):
        precision = resolve_precision(config.training.precision, grid.device)
        splits = {"train": config.data.train, "validation": config.data.validation}
        sets = validation_sets(config.data.validation_sets)
        splits |= {f"validation_{name}": prefixes for name, prefixes in sets.items()}
        streams = {name: TokenStream(shards) for name, shards in splits.items() if shards}
        prefixes = [p for stream in streams.values() for p in stream.prefixes]
        verify_shards(prefixes, config.data.verify_checksums, grid.rank, grid.world_size)
        for stream in streams.values():
            check_ids(stream, config.model.vocab_size, grid.rank, grid.world_size)
    splits_found = {f"the {name} split": stream.fingerprint for name, stream in streams.items()}
    check_ranks_agree(lambda: corpus_facts(splits_found, precision), grid)
    encoder = load_encoder(config, grid, precision)
    with raising_together(grid):
        if encoder is None:
            raise ConfigError("model.kind=gpt has no chunk features: give an egpt configuration")
    assert encoder is not None
    decoder = None
    if config.data.predictions == "stored":
        text = streams.get("train")
        model = starting_model(config, grid, text, encoder, compiles=False, notices=[], new=True)
        decoder = FrozenDecoder(cast("EGPT", model), grid, precision)
    chunk_size = config.model.egpt.chunk_size
    for name, stream in streams.items():
        if len(stream) < chunk_size:  # training encodes it in the loop
            if grid.is_main:
                print(
                    f"{name}: nothing to store, {len(stream):,} of a chunk's {chunk_size:,} tokens"
                )
            continue
        stores = [prepare_store(config, grid, encoder, stream, name, precision)]
        if decoder is not None:
            stores.append(decoder.prepare(config, stores[0], stream, name))
        for store in stores:
            with raising_together(grid):
                if verify and grid.is_main:
                    store.verify()
            if grid.is_main:
                state = "verified" if verify else "complete"
                print(f"{store.folder}: {store.spec.num_chunks:,} chunks, {state}", flush=True)


if __name__ == "__main__":
    main()
