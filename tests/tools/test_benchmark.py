"""Each benchmark runs to its end at the smallest size and records what it printed."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from megaegpt.errors import ConfigError, LaunchError, MegaEGPTError
from tests.generation.test_trained import save_gpt
from tools import benchmark
from tools.benchmarks import attention, device_checks, gpu, growth, llamacpp, overview, train
from tools.benchmarks.common import parse_peers
from tools.benchmarks.processes import Candidate, Result, Workload, compare


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a subcommand; its record."""

    def run(*words: str) -> dict[str, Any]:
        path = tmp_path / "record.json"
        threads = [] if words[0] in ("data", "gpu", "overview") else ["--threads", "1"]
        repetitions = [] if words[0] == "machine" else ["--repetitions", "1"]
        options = [*words, *repetitions, *threads, "--json", str(path)]
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *options])
        benchmark.main()
        return json.loads(path.read_text())

    return run


def test_train_with_a_profile(run, tmp_path, capsys):
    record = run(
        "train", "--shape", "small", "--context", "8", "--batch", "1", "--profile", str(tmp_path)
    )
    (result,) = record["results"]
    assert result["units_per_second"] == pytest.approx(8 / result["seconds"][0])
    assert result["peak_bytes"] > 2**27
    assert record["machine"]["torch"] == torch.__version__
    assert "Self CPU time total" in capsys.readouterr().out
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_training_adapters_has_no_mfu_but_all_weights_have(run, monkeypatch, capsys):
    def measured(candidates: list[Candidate], *_: Any, **__: Any) -> list[Result]:
        info = {"mfu_peak": 100.0, "flops_per_token": 2}
        return [Result(c.name, 20, [1.0], [1.0], 1, dict(info)) for c in candidates]

    monkeypatch.setattr(train, "compare", measured)
    first, last = run("train", "--lora", "4")["results"]
    assert ("mfu" in first, last["mfu"]) == (False, 0.4)
    assert "megaegpt: MFU" not in capsys.readouterr().out


def test_egpt(run, capsys):
    record = run(
        *("egpt", "--hidden", "16", "--layers", "1", "--encoder-layers", "1"),
        *("--heads", "2", "--chunks", "2", "--chunk-size", "4"),
    )
    names = ["megaegpt, online features", "megaegpt, stored history", "megaegpt, stored states"]
    assert [result["name"] for result in record["results"]] == names
    out = capsys.readouterr().out
    assert all(name in out for name in names)


@pytest.mark.long
def test_egpt_whose_memory_alone_learns(run):
    record = run(
        *("egpt", "--memory", "--hidden", "16", "--layers", "1", "--encoder-layers", "1"),
        *("--heads", "2", "--chunks", "2", "--chunk-size", "4"),
    )
    kinds = ("online features", "stored states", "stored predictions")
    assert [result["name"] for result in record["results"]] == [f"megaegpt, {k}" for k in kinds]


def test_a_token_memory_is_timed_by_how_much_it_holds(run, capsys):
    record = run("generate", "--memory", "--hidden", "16", "--heads", "2", "--repetitions", "1")
    assert [row["held"] for row in record["memory"]] == [1024, 16384, 131072]
    assert all(row["all_ms"] > 0 < row["few_ms"] for row in record["memory"])
    assert "131,072" in capsys.readouterr().out


@pytest.mark.parametrize("family", [(), ("--family", "llama", "--kv-heads", "1")])
def test_generate(run, family):
    sizes = ("--hidden", "16", "--layers", "1", "--heads", "2", "--tokens", "3")
    record = run("generate", "--int8", *sizes, *family)
    result, in_int8, reading = record["results"]
    assert in_int8["name"] == "megaegpt, int8"
    assert result["units_per_second"] == pytest.approx(3 / result["seconds"][0])
    assert reading["name"] == "only reading the weights"


@pytest.mark.parametrize("subcommand", ["growth", "attention"])
@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--plot", "none/x.png"], "--plot none/x.png: there is no folder none"),
        (["--plot", "x.foo"], "--plot x.foo: pictures end in ."),
        (["--json", "none/x.json"], "--json none/x.json: there is no folder none"),
        (["--json", "."], "--json .: is a folder: name a file"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(
    subcommand, options, error, monkeypatch, tmp_path, capsys
):
    pytest.importorskip("matplotlib")
    for module in (growth, attention):
        monkeypatch.setattr(module, "compare", lambda *_, **__: pytest.fail("it is measured"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", subcommand, *options])
    with pytest.raises(SystemExit) as end:
        benchmark.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {error}")


def test_an_exponent_is_that_of_the_upper_half():
    x = [2**i for i in range(8)]
    assert growth.exponent(x, [max(16, i) ** 1.5 for i in x]) == pytest.approx(1.5)
    assert growth.exponent([1, 64], [3.0, 3.0]) == pytest.approx(0)


@pytest.mark.long
def test_growth_of_what_must_not_grow(run, tmp_path, capsys):
    """A corpus of any length is drawn from at one cost, and any number of ranks is planned at one;
    these are counted, so a rank's share of the optimizer falls exactly as it should."""
    pytest.importorskip("matplotlib")
    plot = tmp_path / "growth.png"
    curves = run("growth", "--curves", "corpus", "planned", "--points", "3", "--plot", str(plot))[
        "curves"
    ]
    assert [row["x"] for row in curves["corpus"]["rows"]] == [10**6, 10**7, 10**8]
    assert all(row["measured"]["seconds a batch"] > 0 for row in curves["corpus"]["rows"])
    share = curves["planned"]["exponents"]["optimizer bytes a rank"]
    assert share["measured"] == pytest.approx(share["expected"], abs=1e-3)
    assert share["expected"] == pytest.approx(-1)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert re.search(r"exponent due +-1.00 +0.00", capsys.readouterr().out)


def test_growth_leaves_out_what_does_not_fit_and_says_so(run, monkeypatch, capsys):
    class Machine:
        available = 2**20

    monkeypatch.setattr(growth.psutil, "virtual_memory", Machine)
    record = run("growth", "--curves", "history", "--points", "2")
    assert record["curves"]["history"]["rows"] == []
    assert re.search(r"from 1 on: left out, needs 0.0 GiB of 0.0", capsys.readouterr().out)


@pytest.mark.long
def test_growth_of_steps(run):
    """Bytes are counted before and measured after: they agree, and so do their exponents."""
    curves = run("growth", "--curves", "model", "context", "ranks", "history", "--points", "2")[
        "curves"
    ]
    for curve in curves.values():
        assert len(curve["rows"]) == 2
        assert all(row["measured"]["seconds a step"] > 0 for row in curve["rows"])
    for name in ("context", "history"):
        for row in curves[name]["rows"]:
            assert row["measured"]["bytes"] == pytest.approx(row["expected"]["bytes"], rel=0.01)


def test_machine(run, monkeypatch, capsys):
    """What was measured is shown as it is used."""
    assert run("machine")["kernels"]["products"] == []
    assert "oneDNN's products are taken" in capsys.readouterr().out
    monkeypatch.setenv("MEGAEGPT_KERNELS", "blas")
    record = run("machine")
    assert record["kernels"]["machine"]["threads"] == 1
    assert {product["rows"] for product in record["kernels"]["products"]} == {1, 4, 8, 32}
    assert re.search(r"fp32 +head +32 +0\.0 +0\.0 +torch's own", capsys.readouterr().out)


def test_attention(run, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.png"
    record = run(
        *("attention", "--hidden", "24", "--layers", "1", "--lengths", "16", "32"),
        *("--window", "8", "--vocab", "64", "--tokens", "2", "--plot", str(plot)),
        *("--variants", "multi-head", "latent", "sliding-window"),
    )
    caches = {(row["variant"], row["length"]): row["cache_bytes"] for row in record["rows"]}
    assert caches == {
        ("multi-head", 16): 16 * 2 * 24 * 4,
        ("multi-head", 32): 32 * 2 * 24 * 4,
        ("latent", 16): 16 * 24 // 8 * 4,
        ("latent", 32): 32 * 24 // 8 * 4,
        ("sliding-window", 16): 8 * 2 * 24 * 4,
        ("sliding-window", 32): 8 * 2 * 24 * 4,
    }
    assert all(row["train"]["memory_bytes"] > 0 for row in record["rows"])
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_growth_is_of_the_time_per_token_from_4096_on():
    def row(length: int, seconds: float) -> dict[str, Any]:
        times = {"seconds": [seconds, seconds, 9.0], "cpu_seconds": [seconds, seconds, 9.0]}
        return {"variant": "kind", "length": length, "train": times}

    rows = [row(1024, 7.0), row(4096, 1.0), row(8192, 2.0), row(16384, 5.0)]
    assert attention.time_growth(rows) == {"kind": pytest.approx(1.25)}
    assert attention.time_growth(rows[:2]) == {}


def test_data(run, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(f'{{"text": "{n} is a number"}}\n' for n in range(200)))
    record = run("data", "--input", str(corpus), "--workers", "1", "--tokens", "20000")
    assert len(record["tokenising"]) == 3
    assert len({r["tokens_sha256"] for r in record["tokenising"][1:]}) == 1
    assert all(10 < r["memory_mb"] < 500 for r in record["tokenising"][1:])
    assert record["first_batch_seconds"] > 0


def test_features(run):
    record = run(
        *("features", "--hidden", "16", "--layers", "1", "--heads", "2"),
        *("--chunks", "20", "--chunk-size", "8", "--window", "4"),
    )
    assert [r.get("bytes_per_token") for r in record["computing"]] == [None, 8.0, 72.0]
    assert [r["bytes_per_window"] for r in record["reading"]] == [4 * 16 * 4, 4 * 8 * 16 * 4]


def test_checkpoint(run):
    record = run("checkpoint", "--hidden", "16", "--layers", "1", "--heads", "2")
    saved, *_ = record["results"]
    assert [r["name"] for r in record["results"]] == ["save", "load", "write", "read"]
    assert saved["bytes"] > 4 * 4 * 50304 * 16  # weights twice, and Adam's moments


@pytest.mark.long
def test_gpu_without_one(run, capsys, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    less = "ZeRO-2 by DeepSpeed's own methods"  # one of eleven: each is a process
    monkeypatch.setattr(gpu, "REMEDIES", {"all": {}, less: gpu.REMEDIES[less]})
    parts = ("facts", "train", "egpt", "decode", "remedies")
    record = run("gpu", "--page", str(page), "--parts", *parts)
    assert record["problems"] == []
    assert len(record["checks"]) > 20
    assert all(holds for *_, holds in record["checks"])
    assert [name for name, *_ in record["remedies"]] == ["all", less]
    assert record["remedies"][0][2] == "1.00 x"
    text = page.read_text()
    titles = ("# One GPU", "There was no GPU", "## Checks", "## Speed", "## Remedies")
    assert all(title in text for title in titles)
    assert "## Problems" not in text
    assert [name for name, *_ in record["summary"]] == [
        "training small, batch 1",
        "EGPT, online features",
        "EGPT, stored states",
        "decoding, batch 1",
        "decoding, batch 8",
        "decoding not compiled, batch 1",
    ]
    assert "there is no GPU" in capsys.readouterr().out


@pytest.mark.long
def test_the_whole_of_gpu_without_one(run):
    """With the tests and all remedies, so that nothing of it runs on a GPU for the first time."""
    record = run("gpu")
    assert record["problems"] == []
    assert [name for name, *_ in record["remedies"]] == list(gpu.REMEDIES)
    assert any("tests passed" in what for what, *_ in record["checks"])


def checks_as_on_a_gpu() -> dict[str, list[Any]]:
    """On a worker: what only a GPU is asked, of a stand-in for it."""
    switched: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "memory_snapshot", lambda: [{"is_expandable": True}])
        patch.setattr(torch.cuda, "set_sync_debug_mode", switched.append)
        facts = device_checks.environment(True).info["checks"]
        waits = device_checks.waits(True, 1).info["checks"]
    return {"facts": facts, "waits": waits, "switched": switched}


def test_what_only_a_gpu_is_asked_is_asked_of_a_stand_in(distributed):
    (found,) = distributed(1, checks_as_on_a_gpu)
    verdicts = {what: holds for what, *_, holds in found["facts"]}
    assert verdicts["the allocator's segments grow"]
    assert not verdicts["cuDNN"]
    assert found["waits"] == [("waits of a step, ZeRO-1", "0", "at most 4", True)]
    assert found["switched"] == ["warn", "default"]


def test_a_part_that_fails_is_a_problem_and_not_the_end():
    def fails(suite: gpu.Suite) -> None:
        raise RuntimeError("device assertion")

    suite = gpu.Suite(repetitions=1, on_gpu=False)
    suite.attempt("facts", fails)
    suite.note("cuDNN", "1", "from 2 on", False)
    assert suite.problems == [
        "facts: RuntimeError: device assertion",
        "cuDNN is 1, not from 2 on",
    ]
    assert "| cuDNN | 1 | from 2 on | NO |" in suite.page(1.0)


def too_large(batch: int) -> Workload:
    if batch > 2:
        raise torch.OutOfMemoryError(f"{batch} sequences")
    return Workload(lambda: None, batch)


def test_a_batch_that_does_not_fit_is_halved_and_a_failure_is_noted():
    suite = gpu.Suite(repetitions=1, on_gpu=False)
    assert suite.measure("work", too_large, 8, unit="tokens").name == "work, batch 2"
    assert suite.problems == []
    assert suite.measure("other work", fails_at, 8, unit="tokens") is None
    assert suite.problems == ["other work failed"]


def endless(batch: int) -> Workload:
    return Workload(lambda: time.sleep(600), batch)


def test_a_part_that_hangs_ends_when_its_time_is_over():
    suite = gpu.Suite(repetitions=1, on_gpu=False)
    suite.begin(minutes=1 / 60)
    assert suite.measure("work", endless, 1, unit="tokens") is None
    assert suite.problems == ["work failed"]


def test_the_parts_have_less_than_25_minutes_together():
    words = ["gpu"]
    parts = benchmark.new_parser(words).parse_args(words).parts
    assert list(gpu.MINUTES) == parts
    assert sum(gpu.MINUTES.values()) < 25


def fails_at(batch: int) -> Workload:
    raise ValueError(batch)


def fails() -> Workload:
    raise ValueError("no such thing")


def test_a_candidate_that_fails_shows_its_traceback():
    with pytest.raises(LaunchError, match=r"(?s)broken failed:.*ValueError: no such thing"):
        compare([Candidate("broken", fails)], 1)


@pytest.mark.parametrize(
    ("value", "message"),
    [("llama", "not one of nanogpt, hf"), ("nanogpt=/nowhere", "there is no folder /nowhere")],
)
def test_unknown_peers_are_refused(value, message):
    with pytest.raises(ConfigError, match=message):
        parse_peers([value], ("nanogpt", "hf"))


def test_a_peer_that_is_not_installed_is_refused_by_the_package_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    line = ["generate", "--hidden", "16", "--layers", "1", "--heads", "2", "--peer", "llamacpp"]
    arguments = benchmark.new_parser(line).parse_args(line)
    with pytest.raises(ConfigError, match=r"needs the package xllamacpp: pip install xllamacpp$"):
        arguments.run(arguments)


class LlamaServer:
    """In the place of llama.cpp's: writes as many tokens as it is told."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.written = 3

    def handle_completions(self, request: dict[str, Any]) -> dict[str, Any]:
        self.request = request
        end = "length" if self.written == request["max_tokens"] else "stop"
        return {"choices": [{"finish_reason": end} for _ in request["prompt"]]}


@pytest.mark.parametrize(
    ("dtype", "name", "kind"), [("float32", "fp32", "F32"), ("bfloat16", "fp16", "F16")]
)
def test_llama_cpp_is_asked_for_what_the_others_do(tmp_path, monkeypatch, dtype, name, kind):
    pytest.importorskip("gguf")
    servers: list[LlamaServer] = []
    module = SimpleNamespace(
        CommonParams=lambda: MagicMock(),
        ggml_type=SimpleNamespace(GGML_TYPE_F32="F32", GGML_TYPE_F16="F16"),
        Server=lambda options: servers.append(LlamaServer(options)) or servers[-1],
        get_system_info=lambda: "AVX2 = 1",
    )
    monkeypatch.setitem(sys.modules, "xllamacpp", module)
    shape = {"hidden": 16, "layers": 1, "heads": 2, "batch": 2, "tokens": 3, "dtype": dtype}
    prompts = [[1, 2, 3], [4, 5, 6]]
    candidate = llamacpp.candidate(shape, prompts, tmp_path, threads=1)
    assert candidate.name == f"llamacpp, {name}"
    workload = candidate.factory(*candidate.arguments)
    workload.run()
    (server,) = servers
    assert workload.units == 6
    assert workload.info == {"system": "AVX2 = 1"}
    assert Path(server.options.model.path).read_bytes().startswith(b"GGUF")
    assert server.options.n_ctx == 2 * (3 + 3)
    assert server.options.cache_type_k == server.options.cache_type_v == kind
    assert server.options.cpuparams.n_threads == torch.get_num_threads()
    assert server.request["prompt"] == prompts
    assert not server.request["cache_prompt"]
    server.written = 2
    with pytest.raises(MegaEGPTError, match="did not write 3 tokens a prompt"):
        workload.run()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train --kv-heads 2", "--kv-heads is for --family llama"),
        ("egpt --memory --peer egpt=original", "--memory is ours alone"),
        ("generate --egpt --compile", "--egpt measures EGPT alone"),
        ("generate --memory --compile", "--egpt measures EGPT alone"),
        ("generate --egpt --dtype bfloat16", "measure one text in float32"),
        ("generate --memory --batch 2", "measure one text in float32"),
        ("train --shape 124M --processes 2", "--processes 2 do not divide a batch of 1"),
        ("data --input a.jsonl --megabytes 3", "--megabytes is for a corpus that is made"),
    ],
)
def test_options_that_change_nothing_are_refused(line, message):
    arguments = benchmark.new_parser(line.split()).parse_args(line.split())
    with pytest.raises(ConfigError, match=message):
        arguments.run(arguments)


def test_every_benchmark_is_a_subcommand():
    folder = Path(benchmark.__file__).parent / "benchmarks"
    parts = {"common", "processes", "engines", "peers", "shapes", "device_checks"}
    parts |= {"checklist", "nodes", "node_parts", "memory", "growth_points", "llamacpp"}
    modules = {path.stem for path in folder.glob("[!_]*.py")} - parts
    assert modules == set(benchmark.SUBCOMMANDS)


def test_the_commands_of_the_pages_are_accepted():
    docs = Path(benchmark.__file__).parents[1] / "docs"
    pages = [path.read_text(encoding="utf-8") for path in docs.glob("*.md")]
    commands = [
        shlex.split(line)
        for page in pages
        for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("python tools/benchmark.py")
    ]
    assert len(commands) >= 5
    for words in commands:
        benchmark.new_parser(words[2:]).parse_args(words[2:])


@pytest.mark.long
def test_serve(tmp_path, monkeypatch, capsys):
    """A minute of load, with clients that leave; MEGAEGPT_SOAK_SECONDS makes it longer."""
    save_gpt(tmp_path / "tiny", max_seq_len=256, hidden_size=64)
    record = tmp_path / "record.json"
    seconds = os.environ.get("MEGAEGPT_SOAK_SECONDS", "60")
    line = f"benchmark.py serve --checkpoint {tmp_path}/tiny --context 256 --seconds {seconds}"
    monkeypatch.setattr(
        sys, "argv", [*line.split(), "--prompt-words", "100", "--json", str(record)]
    )
    benchmark.main()  # which fails on other statuses, texts left over, and memory that grows
    found = json.loads(record.read_text())
    assert found["left"] > 0
    assert found["tokens_per_second"] > 0
    assert "first token" in capsys.readouterr().out


def test_an_overview_has_the_fastest_other_program_beside_each_of_ours(run, capsys, monkeypatch):
    tiny = ("--hidden", "16", "--layers", "1", "--heads", "2")
    parts = {
        "decode": ("decoding", ("generate", *tiny, "--tokens", "2", "--threads", "1")),
        "egpt": (
            "training",
            ("egpt", *tiny, "--encoder-layers", "1", "--chunks", "2", "--chunk-size", "4"),
        ),
    }
    monkeypatch.setattr(overview, "PARTS", parts)
    record = run("overview", "--peer", "hf")
    ours, peer, _ = record["parts"]["decode"]["results"]
    before, table = capsys.readouterr().out.split("the fastest other")
    assert f"{record['machine']['cpu']}, {os.cpu_count()} cores, torch" in before
    table = table.splitlines()
    (line,) = [line for line in table if line.startswith("decoding")]
    ratio = ours["units_per_second"] / peer["units_per_second"]
    assert peer["name"] == "hf"
    assert line.split()[-2:] == ["hf", f"{ratio:.2f}"]
    (line,) = [line for line in table if line.startswith("training")]  # an EGPT is only ours
    assert line.split()[1:3] == ["online", "features"]


def test_an_overview_leaves_a_program_out_where_it_has_no_such_model():
    peers = ["nanogpt=x", "hf", "llamacpp", "egpt=y"]
    assert overview.peers_for(("generate",), peers) == ["--peer", "hf", "--peer", "llamacpp"]
    assert overview.peers_for(("train",), peers) == ["--peer", "nanogpt=x", "--peer", "hf"]
    llama = overview.PARTS["train-llama"][1]
    assert overview.peers_for(llama, peers) == ["--peer", "hf"]
    assert overview.peers_for(("egpt",), peers) == ["--peer", "egpt=y"]
