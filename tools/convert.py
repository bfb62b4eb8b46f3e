"""Models and checkpoints between forms: Hugging Face's GPT-2, safetensors, other topologies.

    python tools/convert.py import gpt2 weights/gpt2
    python tools/convert.py import downloads/gpt2-xl weights/gpt2-xl
    python tools/convert.py export runs/gpt exported/gpt
    python tools/convert.py masters runs/gpt weights/gpt
    python tools/convert.py list runs/gpt --verify
    python tools/convert.py reshape runs/gpt merged/checkpoints
    torchrun --nproc_per_node 4 tools/convert.py reshape runs/gpt split/checkpoints \\
        --tensor-parallel-size 2

import   GPT-2 weights of Hugging Face's become a folder of ours, for any tensor-parallel size. The
         source is gpt2, gpt2-medium, gpt2-large, gpt2-xl or hf:OWNER/NAME (which need the network
         once), or a folder with config.json and model.safetensors or pytorch_model.bin. It is not
         needed before training: training.initialize_from and model.encoder.source take the same
         names, and keep what they convert under ~/.cache/megaegpt.
export   The weights of a run, a checkpoint or a weights folder for other programs. A model that
         GPT-2 can compute becomes a folder that transformers loads:
         AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained. Any other becomes
         model.safetensors, under full names and whatever the parallelism was, with config.json.
masters  The fp32 weights that the optimizer of a checkpoint keeps, as a folder of ours. A run in
         bf16 or fp16 computes with rounded ones, which its checkpoints hold under weights/: take
         those for inference, and these to train further.
list     What a run, a checkpoint or a weights folder holds.
reshape  A checkpoint with its optimizer state, merged or split for as many processes as run this:
         one writes it for one rank, torchrun's for their number, tensor- times data-parallel. A
         run resumes at another topology without it; this does the work beforehand.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megaegpt.arguments import ArgumentParser, integer, path
from megaegpt.errors import CheckpointError, exits_cleanly


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

    command = commands.add_parser("import", help="GPT-2 weights from Hugging Face's form")
    command.add_argument("source", metavar="SOURCE", help="a name on the hub, or a folder")
    command.add_argument("output", type=path, metavar="FOLDER", help="a new folder")
    command.set_defaults(run=_import)

    command = commands.add_parser("export", help="weights for transformers and other programs")
    command.add_argument(
        "source", type=path, metavar="SOURCE", help="a run, a checkpoint, or a weights folder"
    )
    command.add_argument("output", type=path, metavar="FOLDER", help="a new folder")
    command.set_defaults(run=_export)

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
        "--zero-stage", type=int, choices=(0, 1, 2), help="of DeepSpeed (default: as it was)"
    )
    command.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed gives it
    command.set_defaults(run=_reshape)
    return parser.parse_args()


def _import(arguments: argparse.Namespace) -> None:
    from megaegpt.files import whole_folder
    from megaegpt.interop.gpt2_config import CONFIG
    from megaegpt.interop.huggingface import download, import_gpt2, is_hub_name
    from megaegpt.training.checkpoint.inspection import describe_contents

    folder = Path(arguments.source)
    if not folder.is_dir() and is_hub_name(arguments.source):
        folder = download(arguments.source)
    if not (folder / CONFIG).exists():
        raise CheckpointError(
            f"{folder} is no folder of a model in Hugging Face's form: it needs {CONFIG}, and "
            "model.safetensors or pytorch_model.bin"
        )
    with whole_folder(arguments.output) as temporary:
        import_gpt2(folder, temporary)
    print("\n".join(describe_contents(arguments.output, tensors=False)))


def _export(arguments: argparse.Namespace) -> None:
    from megaegpt.interop.export import export_weights
    from megaegpt.model.weights import find_weights, read_weights_config

    weights = find_weights(arguments.source)
    differences = export_weights(weights, arguments.output)
    if differences:
        reason = f"Hugging Face's GPT-2 has no {', '.join(differences)}"
        print(f"{arguments.output}: as safetensors; {reason}")
        return
    has_tokenizer = (arguments.output / "vocab.json").exists()
    print(
        f"{arguments.output}: in Hugging Face's form, "
        f"{'with' if has_tokenizer else 'without'} GPT-2's tokenizer"
    )
    if read_weights_config(weights)[0].document_end is not None:
        print("notice: transformers does not begin anew after a document's end: one text a row")


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
