"""The fp32 weights that the optimizer of a checkpoint keeps, as a folder of weights or adapters."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from megaegpt.errors import CheckpointError
from megaegpt.files import check_tensor_file, whole_folder
from megaegpt.interop.vocabulary_files import copy_tokenizer
from megaegpt.model.adapter_files import read_adapter, write_adapter
from megaegpt.model.weights import ADAPTER, WEIGHTS, read_any_config, write_weights
from megaegpt.training.checkpoint.deepspeed_state import loading, make_scratch
from megaegpt.training.checkpoint.manager import STATE
from megaegpt.training.checkpoint.manifest import Manifest, Topology, verify_files
from megaegpt.training.checkpoint.universal import FP32, convert, read_parameter


def export_masters(checkpoint: Path, output: Path) -> Manifest:
    """Write the fp32 weights of a checkpoint into the new folder ``output``; by one process.

    A run in half precision computes with rounded weights, which are what its checkpoints hold under
    ``weights``: right for inference. Its optimizer goes on from these; so does further training.
    Frozen parameters have no such value and are taken as they are. Of a run with adapters these
    alone are trained, and come out as its adapter does.

    Returns:
        What the checkpoint is.

    Raises:
        CheckpointError: it is damaged, ``output`` is in use, or there is no room for a while for
            three times the checkpoint.
    """
    manifest = Manifest.read(checkpoint)
    verify_files(manifest.files, checkpoint)
    config, extra, is_whole = read_any_config(checkpoint / "weights")
    shapes = {name: tuple(shape) for name, shape in manifest.parameters.items()}
    source, stage = checkpoint / STATE, Topology(**manifest.topology).zero_stage
    with whole_folder(output) as temporary:
        scratch = temporary / "scratch"
        make_scratch(scratch, source)
        saved = _tensors(checkpoint / "weights" / (WEIGHTS if is_whole else ADAPTER))
        tensors = {name: value.float() for name, value in saved.items()}
        with loading(source):
            convert(source, scratch / "universal", shapes, stage)
            for name, shape in shapes.items():
                whole = read_parameter(scratch / "universal", name, FP32, shape)
                tensors[name] = whole.clone(memory_format=torch.contiguous_format)
        shutil.rmtree(scratch)
        if is_whole:
            write_weights(tensors, config, temporary, extra)
        else:
            adapter = read_adapter(checkpoint / "weights")
            write_adapter(tensors, temporary, config, adapter.lora, adapter.base, adapter.extra)
        copy_tokenizer(checkpoint / "weights", temporary)
    return manifest


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    check_tensor_file(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
