"""llama.cpp beside ours: a model of the same sizes in its own format, continued by its own server.

The package ``xllamacpp`` runs that server in the process; its wheel for CPUs is built for AVX2.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from megaegpt.errors import ConfigError, MegaEGPTError
from megaegpt.interop.gguf_export import export_gguf
from megaegpt.model.build import build_model
from megaegpt.model.weights import save_weights
from tools.benchmarks.common import single_grid
from tools.benchmarks.processes import Candidate, Workload
from tools.benchmarks.shapes import model_config

DTYPES = {"float32": ("fp32", torch.float32), "bfloat16": ("fp16", torch.float16)}
"""Ours -> its name and its matrices' type: fp16 has as many bytes as bf16, and is what it likes."""


def package() -> ModuleType:
    """llama.cpp with its server, for Python.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import xllamacpp
    except ImportError:
        raise ConfigError(
            "--peer llamacpp needs the package xllamacpp: pip install xllamacpp"
        ) from None
    return xllamacpp


def candidate(
    shape: dict[str, Any], prompts: list[list[int]], folder: Path, threads: int | None
) -> Candidate:
    """What decodes with llama.cpp; ``folder`` gets its model, and must stay until it is ready.

    Raises:
        ConfigError: the package is not installed.
        CheckpointError: the model cannot be written.
    """
    package()
    name, dtype = DTYPES[shape["dtype"]]
    grid = single_grid()
    save_weights(build_model(model_config(shape), grid), folder / "weights", grid)
    file = folder / "model.gguf"
    export_gguf(folder / "weights", file, dtype)
    return Candidate(f"llamacpp, {name}", decoding, (file, shape, prompts), threads=threads)


def decoding(file: Path, shape: dict[str, Any], prompts: list[list[int]]) -> Workload:
    """Greedy continuations by its server, a slot for each prompt; the cache is of the weights'
    type, and as long as the text.
    """
    llama = package()
    threads, tokens = torch.get_num_threads(), shape["tokens"]
    options = llama.CommonParams()
    options.model.path = str(file)
    options.n_parallel = len(prompts)
    options.n_ctx = sum(map(len, prompts)) + len(prompts) * tokens
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
    kind = "F32" if shape["dtype"] == "float32" else "F16"
    options.cache_type_k = options.cache_type_v = getattr(llama.ggml_type, f"GGML_TYPE_{kind}")
    options.verbosity = -1
    server = llama.Server(options)
    request = {
        "prompt": prompts,
        "max_tokens": tokens,
        "samplers": ["temperature"],  # at 0 it takes the likeliest, and no other looks at them
        "temperature": 0.0,
        "ignore_eos": True,
        "cache_prompt": False,
    }

    def one() -> None:
        answer = server.handle_completions(request)
        ends = [choice["finish_reason"] for choice in answer.get("choices", [])]
        if ends != ["length"] * len(prompts):
            raise MegaEGPTError(f"llama.cpp did not write {tokens} tokens a prompt: {answer}")

    return Workload(one, len(prompts) * tokens, {"system": llama.get_system_info()})
