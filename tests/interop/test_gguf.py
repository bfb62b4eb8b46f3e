"""GGUF files: read as transformers reads them, written for llama.cpp, refused where they are not
what they seem.
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megaegpt.config import GenerationConfig, ModelConfig
from megaegpt.data.tokenizers.gguf_vocabulary import gguf_vocabulary
from megaegpt.data.tokenizers.tokenizer_files import (
    CHAT_TEMPLATE_FILE,
    load_tokenizer,
    save_tokenizer,
)
from megaegpt.errors import CheckpointError, MegaEGPTError
from megaegpt.generation.generator import TextGenerator
from megaegpt.gguf_files import read_gguf_header
from megaegpt.interop import foreign_models, gguf_export
from megaegpt.interop.export import export_huggingface
from megaegpt.interop.foreign_models import find_foreign, import_model, need_foreign, read_foreign
from megaegpt.interop.gguf_export import export_gguf
from megaegpt.interop.gguf_weights import (
    LLAMA3_SCALING,
    ROPE_FACTORS,
    gguf_tensors,
)
from megaegpt.interop.sources import resolve_weights_source, source_config
from megaegpt.model.build import build_model, empty_model
from megaegpt.model.gpt import GPT
from megaegpt.model.weights import load_weights, read_weights_config, save_weights
from megaegpt.parallel.grid import ProcessGrid
from tests.damage import damaged
from tests.interop.tensors_alive import TensorsAlive
from tests.tiny.families import random_model
from tests.tiny.tokenizers import trained_tokenizer

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

WRITTEN = """
    gpt2 llama_with_biases llama_yarn llama_linear mistral_without_window qwen2 qwen3 olmo2
""".split()  # noqa: SIM905


def _ours(case: str, folder: Path, **changes: Any) -> Path:
    random_model(case, **changes).save_pretrained(folder / "theirs")
    import_model(folder / "theirs", folder / "ours")
    return folder / "ours"


def _file(case: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    export_gguf(_ours(case, folder), folder / "model.gguf", dtype)
    return folder / "model.gguf"


def _tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def _assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# -- there and back -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", WRITTEN)
def test_what_is_written_is_read_bit_for_bit(tmp_path: Path, case: str) -> None:
    import_model(_file(case, tmp_path), tmp_path / "again")
    _assert_equal(_tensors(tmp_path / "again"), _tensors(tmp_path / "ours"))
    for name in ("ours", "again"):
        export_huggingface(tmp_path / name, tmp_path / f"{name}_theirs")
    texts = [(tmp_path / f"{n}_theirs" / "config.json").read_text() for n in ("ours", "again")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("case", ["gpt2", "llama_with_biases", "olmo2"])
def test_one_tensor_at_a_time_is_in_memory(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp's order of rows is made of one tensor, too."""
    reading, writing = TensorsAlive(), TensorsAlive()
    monkeypatch.setattr(foreign_models, "gguf_tensors", reading.opening(gguf_tensors))
    monkeypatch.setattr(gguf_export, "open_ours", writing.open_ours)
    import_model(_file(case, tmp_path), tmp_path / "again")
    assert min(len(reading.counts), len(writing.counts)) > 20
    assert max(reading.counts) <= 2  # the last one, until the next has its name
    parts = 3 if case == "gpt2" else 1  # queries, keys and values are one tensor there
    assert max(writing.counts) <= parts + 1


@pytest.mark.parametrize("case", ["gpt2", "llama_tied", "qwen2", "qwen3"])
def test_transformers_reads_what_is_written(tmp_path: Path, case: str) -> None:
    """Its own reader undoes llama.cpp's order of rows."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = random_model(case)
    path = _file(case, tmp_path)
    found = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    expected = {n: t for n, t in model.state_dict().items() if n in found}
    assert len(found) >= len(list(model.parameters()))
    _assert_equal(found, expected)


def test_half_precision_rounds_matrices_alone(tmp_path: Path) -> None:
    path = _file("qwen3", tmp_path, torch.float16)
    import_model(path, tmp_path / "again")
    ours = _tensors(tmp_path / "ours")
    rounded = {n: t.half().float() if t.dim() > 1 else t for n, t in ours.items()}
    _assert_equal(_tensors(tmp_path / "again"), rounded)
    kinds = {t.type_number for t in read_gguf_header(path).tensors.values()}
    assert kinds == {0, 1}


def test_llama3s_scaling_is_a_tensor_there(tmp_path: Path) -> None:
    """It has no key of metadata."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, **LLAMA3_SCALING}
    longest = {"max_position_embeddings": 131072, "rope_parameters": scaling}
    weights = _ours("llama", tmp_path, **longest)
    export_gguf(weights, tmp_path / "model.gguf", torch.float32)
    import_model(tmp_path / "model.gguf", tmp_path / "again")
    ours, again = (read_weights_config(folder)[0] for folder in (weights, tmp_path / "again"))
    assert again.rope_scaling == ours.rope_scaling
    assert again.rope_base == ours.rope_base


def test_only_the_published_scaling_of_llama3_is_known_by_its_tensor(tmp_path: Path) -> None:
    header = read_gguf_header(_file("llama3", tmp_path))
    assert header.tensors[ROPE_FACTORS].shape == (3,)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is not the scaling of Llama"):
        import_model(tmp_path / "model.gguf", tmp_path / "again")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("mistral", "no window=7"),
        ("qwen2_with_windows", "Qwen 2 has no window=7"),
        ("llama_geglu", "Llama has no mlp=geglu"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(tmp_path: Path, case: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        _file(case, tmp_path)
    assert not (tmp_path / "model.gguf").exists()


def test_llama_cpp_finds_the_tokenizer_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It opens no file that does not say which one there is, and wants a token for every row."""
    weights = _ours("llama", tmp_path, vocab_size=704)
    tokenizer = trained_tokenizer()
    save_tokenizer(tokenizer, weights)
    export_gguf(weights, tmp_path / "model.gguf", torch.float32)
    found = read_gguf_header(tmp_path / "model.gguf").metadata
    assert found["general.file_type"] == 0
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 704 == reader.tensors[0].shape[1]
    assert load_tokenizer(tmp_path / "model.gguf").fingerprint == tokenizer.fingerprint
    import_model(tmp_path / "model.gguf", tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").fingerprint == tokenizer.fingerprint
    said = capsys.readouterr()
    assert "notice" not in said.out + said.err


@pytest.mark.long
def test_llama_cpp_writes_what_ours_does(tmp_path: Path) -> None:
    """30 greedy tokens; as text, which is all that its server gives."""
    llama = pytest.importorskip("xllamacpp", reason="pip install xllamacpp to run llama.cpp")
    weights = _ours("llama", tmp_path, vocab_size=700, max_position_embeddings=64)
    tokenizer = trained_tokenizer()
    save_tokenizer(tokenizer, weights)
    export_gguf(weights, tmp_path / "model.gguf", torch.float32)
    model = empty_model(read_weights_config(weights)[0], ProcessGrid()).eval()
    load_weights(model, weights, ProcessGrid())
    assert isinstance(model, GPT)
    prompt = tokenizer.encode("Shards of tokens")
    greedy = GenerationConfig(max_new_tokens=30, temperature=0.0)
    written = list(TextGenerator(model).stream(prompt, greedy))

    options = llama.CommonParams()
    options.model.path = str(tmp_path / "model.gguf")
    options.n_parallel, options.n_ctx, options.verbosity = 1, 64, -1
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
    options.cache_type_k = options.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    answer = llama.Server(options).handle_completions(
        {
            "prompt": prompt,
            "max_tokens": 30,
            "samplers": ["temperature"],
            "temperature": 0.0,
            "ignore_eos": True,
        }
    )
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["text"] == tokenizer.decode(written)


def test_the_template_that_a_model_was_tuned_on_goes_with_gpt2s_tokenizer(
    tmp_path: Path,
) -> None:
    weights = _ours("gpt2", tmp_path, vocab_size=50257)
    (weights / CHAT_TEMPLATE_FILE).write_text("{{ 'tuned' }}")
    export_gguf(weights, tmp_path / "model.gguf", torch.float16)
    found = read_gguf_header(tmp_path / "model.gguf").metadata
    assert found["tokenizer.chat_template"] == "{{ 'tuned' }}"


def test_gpt2s_tokenizer_goes_into_the_file_of_what_was_trained_with_it(tmp_path: Path) -> None:
    """With names for the rows that it has no tokens for."""
    rows = ModelConfig(vocab_size=50304, max_seq_len=8, hidden_size=8, num_layers=1, num_heads=1)
    extra = {"tokenizer_fingerprint": load_tokenizer().fingerprint}
    save_weights(build_model(rows, ProcessGrid()), tmp_path / "ours", ProcessGrid(), extra)
    export_gguf(tmp_path / "ours", tmp_path / "model.gguf", torch.float32)
    tokens = gguf.GGUFReader(tmp_path / "model.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert len(set(tokens)) == 50304
    assert load_tokenizer(tmp_path / "model.gguf").fingerprint == load_tokenizer().fingerprint


def test_a_file_without_a_tokenizer_is_for_token_ids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _file("llama", tmp_path)
    assert read_gguf_header(path).metadata["tokenizer.ggml.model"] == "no_vocab"
    assert "without a tokenizer: none lies with the weights" in capsys.readouterr().out
    import_model(path, tmp_path / "again")
    said = capsys.readouterr()
    assert said.out == ""  # it may be a program's whose stdout is a text
    assert "no tokenizer goes with the weights" in said.err


# -- quantised tensors ----------------------------------------------------------------------------

QUANTISED = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "BF16"]


def _one_tensor(path: Path, kind: Any, rows: int = 3, blocks: int = 2) -> np.ndarray:
    """A file of one tensor with random blocks whose scales are finite."""
    _, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 0x70, (rows, blocks * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("x", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return data


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_tensors_are_what_the_package_makes_of_them(tmp_path: Path, name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    data = _one_tensor(tmp_path / "x.gguf", kind)
    found = gguf_tensors(read_gguf_header(tmp_path / "x.gguf"))["x"]
    values = found.read()
    assert values.dtype == torch.float32
    assert tuple(values.shape) == found.shape
    assert np.array_equal(values.numpy(), gguf.dequantize(data, kind))
    assert values.isfinite().all()


def test_a_quantisation_that_is_not_read_is_named(tmp_path: Path) -> None:
    _one_tensor(tmp_path / "x.gguf", gguf.GGMLQuantizationType.Q8_1)
    header = read_gguf_header(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="x is Q8_1, which the gguf package does not"):
        gguf_tensors(header)
    content = (tmp_path / "x.gguf").read_bytes()
    number = int(gguf.GGMLQuantizationType.Q8_1)
    at = content.index(struct.pack("<IQ", number, 0))
    (tmp_path / "y.gguf").write_bytes(content[:at] + struct.pack("<I", 777) + content[at + 4 :])
    header = read_gguf_header(tmp_path / "y.gguf")
    with pytest.raises(CheckpointError, match="x is of ggml's type 777, which"):
        gguf_tensors(header)


def test_a_file_without_its_end_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    path = _file("qwen2", tmp_path)
    whole = path.read_bytes()
    for length in (0, 3, 20, 100, len(whole) // 2, len(whole) - 40):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf.*(cut short|beyond its end|damaged)"):
            import_model(tmp_path / "cut.gguf", tmp_path / "again")


# -- headers --------------------------------------------------------------------------------------


def _header(*parts: bytes, version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


HUGE = 2**60


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged or no GGUF file"),
        (b"PK\3\4" + bytes(30), "does not begin with GGUF"),
        (_header(version=1), "its version is 1; this program reads 2 and 3"),
        (_header(version=3 << 24), "a big-endian file"),
        (_header(tensors=HUGE), "a length of 1,152,921,504,606,846,976 at byte 8 is beyond"),
        (_header(keys=HUGE), "a length of 1,152,921,504,606,846,976 at byte 16 is beyond"),
        (_header(struct.pack("<Q", HUGE), bytes(20), keys=1), "at byte 24 is beyond its end"),
        (_header(_text("a"), struct.pack("<IQ", 8, HUGE), keys=1), "a length of 1,152,9"),
        (_header(_text("a"), struct.pack("<IIQ", 9, 0, HUGE), keys=1), "a length of 1,152,9"),
        (_header(_text("a"), struct.pack("<IIQ", 9, 8, HUGE), keys=1), "a length of 1,152,9"),
        (_header(_text("a"), struct.pack("<I", 13), bytes(9), keys=1), "a value of type 13"),
        (_header(_text("a"), b"\4\0\0\0\0\0\0\0" * 2, keys=1), ""),
        (
            _header(*[_text("a") + struct.pack("<II", 4, 1)] * 2, keys=2),
            "the key a occurs twice",
        ),
        (
            _header(_text("t"), struct.pack("<IQQIQ", 2, HUGE, HUGE, 0, 0), tensors=1),
            r"the tensor t has shape \(1152921504606846976, 1152921504606846976\)",
        ),
        (
            _header(_text("t"), struct.pack("<IQIQ", 1, 4, 0, HUGE), bytes(64), tensors=1),
            "it is cut short: the tensor t is beyond its end",
        ),
        (
            _header(_text("t"), struct.pack("<I", 5), bytes(80), tensors=1),
            "the tensor t has 5 dimensions",
        ),
    ],
)
def test_a_header_that_lies_is_refused_without_taking_its_word(
    tmp_path: Path, content: bytes, words: str
) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    if not words:
        read_gguf_header(tmp_path / "x.gguf")
        return
    with pytest.raises(CheckpointError, match=words) as caught:
        read_gguf_header(tmp_path / "x.gguf")
    assert str(tmp_path / "x.gguf") in str(caught.value)


def test_damage_is_a_line_and_nothing_else(tmp_path: Path) -> None:
    whole = _file("qwen3", tmp_path).read_bytes()
    draw, refused = random.Random(3), []
    path = tmp_path / "damaged.gguf"
    for _ in range(120):
        path.write_bytes(damaged(whole, draw))
        try:
            read_foreign(path)
            import_model(path, tmp_path / "again")
        except MegaEGPTError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert all(str(path) in said and "\n" not in said for said in refused)


# -- metadata -------------------------------------------------------------------------------------


def _with_metadata(
    path: Path,
    arch: str = "qwen3",
    vocabulary: Mapping[str, Any] = MappingProxyType({}),
    without: str = "",
    **changes: Any,
) -> Path:
    """The file again with other metadata; None leaves a key out.

    Args:
        vocabulary: keys of a tokenizer.
        without: a tensor that is left out.
    """
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_name("changed.gguf"), arch)
    values = {key: field.contents() for key, field in reader.fields.items() if "." in key}
    changes = {f"qwen3.{key.replace('__', '.')}": value for key, value in changes.items()}
    for key, value in {**values, **changes, **vocabulary}.items():
        if not key.startswith(("GGUF.", "general.")) and value is not None:
            kinds = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
            kinds[bool] = writer.add_bool
            kinds.get(type(value), writer.add_array)(key, value)
    for tensor in reader.tensors:
        if tensor.name != without:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name("changed.gguf")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arch": "gptneox"}, "general.architecture=gptneox is not supported, only gpt2, llama"),
        ({"without": "token_embd.weight"}, r"changed\.gguf: token_embd\.weight is missing"),
        ({"block_count": None}, "block_count is missing"),
        ({"block_count": 3}, "it holds 2 layers, block_count is 3"),
        ({"embedding_length": "24"}, "hidden_size must be an integer"),
        ({"attention__head_count_kv": [2, 2]}, "num_key_value_heads must be an integer or null"),
        ({"expert_count": 4}, "expert_count=4 is not supported"),
        ({"attention__value_length": 4}, "attention.value_length=4 is not supported, only 10"),
        ({"rope__dimension_count": 4}, "rope.dimension_count=4 is not supported, only 10"),
        ({"rope__scaling__type": "longrope"}, "rope_type=longrope is none of"),
        ({"feed_forward_length": 45}, "has shape"),
        ({"rope__scaling__type": "yarn", "rope__scaling__attn_factor": 1.0}, "factor=None must be"),
        ({"attention__layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
        ({"vocab_size": 3}, "vocab_size=3, and the embedding has 101 rows"),
        ({"rope__scaling__attn_factor": 0.5}, "attn_factor=0.5 is for rope.scaling.type=yarn"),
        ({"rope__scaling__attn_factor": "1"}, "attn_factor must be a number"),
        ({"rope__scaling__factor": [1.0]}, "factor must be a number"),
    ],
)
def test_metadata_of_another_model_is_refused_by_its_name(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    path = _with_metadata(_file("qwen3", tmp_path), **changes)
    with pytest.raises(CheckpointError, match=words) as caught:
        import_model(path, tmp_path / "again")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["blk.1.attn_k_norm.weight", "output_norm.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    path = _with_metadata(_file("qwen3", tmp_path), without=name)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} is missing") as caught:
        import_model(path, tmp_path / "again")
    assert str(path) in str(caught.value)
    assert not (tmp_path / "again").exists()


def test_a_tokenizer_of_more_tokens_than_the_model_is_refused_before_weights_are_written(
    tmp_path: Path,
) -> None:
    larger = gguf_vocabulary(trained_tokenizer(), 700)
    assert larger is not None
    path = _with_metadata(_file("qwen3", tmp_path), vocabulary=larger)
    with pytest.raises(
        CheckpointError, match=r"holds a tokenizer of 700 tokens and a model of 101"
    ):
        import_model(path, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_factor_without_a_type_is_of_linear_scaling_as_for_llama_cpp(tmp_path: Path) -> None:
    path = _with_metadata(_file("qwen3", tmp_path), rope__scaling__factor=4.0)
    scaling = source_config(path).rope_scaling
    assert (scaling.kind, scaling.factor) == ("linear", 4.0)


def test_a_file_whose_name_is_not_utf8_is_written_with_a_name_that_is(tmp_path: Path) -> None:
    path = tmp_path / "caf\udce9.gguf"
    export_gguf(_ours("qwen3", tmp_path), path)
    assert read_gguf_header(path).metadata["general.name"] == "caf\ufffd"


def test_a_folder_with_one_gguf_file_stands_for_it(tmp_path: Path) -> None:
    path = _file("qwen3", tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    path.rename(folder / "a.gguf")
    assert find_foreign(folder) == folder / "a.gguf"
    assert source_config(folder) == source_config(folder / "a.gguf")
    (folder / "b.gguf").write_bytes((folder / "a.gguf").read_bytes())
    with pytest.raises(CheckpointError, match="holds 2 GGUF files: name one"):
        need_foreign(folder)


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/step_00000007"])
def test_a_gguf_file_in_a_run_is_not_taken_for_the_run(tmp_path: Path, place: str) -> None:
    """Nor is it where there is no checkpoint to take: it is an export of an earlier one."""
    folder, checkpoints = tmp_path / "run" / place, tmp_path / "run" / "checkpoints"
    weights = checkpoints / "step_00000007" / "weights"
    weights.parent.mkdir(parents=True)
    _file("qwen3", tmp_path).rename(folder / "model.gguf")
    (tmp_path / "ours").rename(weights)
    (checkpoints / "latest").write_text("step_00000007\n")
    assert resolve_weights_source(folder, ProcessGrid()) == weights
    assert source_config(folder) == read_weights_config(weights)[0]
    with pytest.raises(CheckpointError, match=r"is meant, name that, .*model\.gguf"):
        need_foreign(folder)
    (weights / "config.json").unlink()
    (weights.parent / "manifest.json").touch()
    with pytest.raises(CheckpointError, match=f"{folder} holds no weights"):
        source_config(folder)
