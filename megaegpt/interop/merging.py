"""An adapter and the weights beside which it was trained, as weights."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from megaegpt.files import whole_folder
from megaegpt.interop.export import open_ours
from megaegpt.interop.tensor_writer import write_tensors
from megaegpt.interop.vocabulary_files import copy_tokenizer
from megaegpt.model.adapter_files import check_base, open_adapter, read_adapter
from megaegpt.model.adapters import merge
from megaegpt.model.build import meta_model
from megaegpt.model.weights import WEIGHTS, verify_weights, write_description


def merge_adapter(folder: Path, base: Path, output: Path) -> None:
    """Write the fp32 weights of a model with an adapter's products added, and what lies beside the
    adapter; one tensor at a time is in memory.

    Args:
        folder: of the adapter.
        base: weights folder of its base.
        output: a new folder.

    Raises:
        CheckpointError: a file is missing, damaged or does not fit, the base is another one, or
            ``output`` cannot be written.
    """
    adapter = read_adapter(folder)
    check_base(adapter, base)
    verify_weights(folder)
    shapes = {n: tuple(p.shape) for n, p in meta_model(adapter.config).named_parameters()}
    with (
        open_adapter(adapter) as tensors,
        open_ours(base, adapter.config) as read,
        whole_folder(output) as temporary,
    ):

        def merged(name: str) -> Tensor:
            weight = read(name)
            assert weight is not None  # every tensor of the model is in the file
            return merge(weight, name, tensors, adapter.lora.scale)

        write_tensors(temporary / WEIGHTS, shapes, merged)
        extra = {**adapter.extra, "merged_from": [adapter.base.source, str(folder)]}
        write_description(adapter.config, temporary, extra)
        copy_tokenizer(folder, temporary)
