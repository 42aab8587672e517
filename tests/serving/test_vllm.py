"""Exports in vLLM itself, by the plugin: `make test-vllm`, which makes an environment for it in build/vllm.

Greedy tokens are compared one by one with those of transformers and of our engine.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PATIENCE, REPOSITORY, run_here, wait_until
from served_models import CONFIGS, CONTEXT, of_our_engine, of_transformers, unequal_prompts, write_served

from checkpoints.exports import modeling_kraken
from data_prep.tokenizers import load_tokenizer
from kraken_train.bench.vllm_jobs import Job, Outcome, environment, run_jobs
from kraken_train.model.config import KrakenConfig
from kraken_train.parallel.ranks import free_port

PYTHON = REPOSITORY / "build/vllm/bin/python"
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON.exists(), reason="vLLM is not installed in build/vllm (see make test-vllm)"),
]
PROMPTS = unequal_prompts(20)
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": CONTEXT,
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "block_size": 32,
    "max_num_seqs": 8,  # the others wait, and join when one ends
    "max_num_batched_tokens": 48,  # longer prompts are read in pieces
}
OF_TWO_RANKS = (
    "kraken", "kraken-gqa", "kraken-modern", "standard-modern", "parallel-mqa", "track", "ladder-modern", "fal",
)  # fmt: skip
OF_FOUR_RANKS = ("kraken", "standard")
COMPILED = "kraken-modern"
QUANTIZED = ("kraken", "standard")
Expected = Callable[[str], list[list[int]]]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    return {name: write_served(folder / name, config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def expected(exports: dict[str, Path]) -> Expected:
    """Of transformers, by name of the model."""
    return functools.cache(lambda name: of_transformers(exports[name], PROMPTS))


@pytest.fixture(scope="module")
def one_rank(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """All models by one process; the prompts twice, so that the second time their beginnings are cached."""
    jobs = {name: job(folder) for name, folder in exports.items()}
    jobs["compiled"] = job(exports[COMPILED], enforce_eager=False)
    jobs["trusted"] = job(exports["kraken"], trust_remote_code=True)
    for name in QUANTIZED:
        jobs[f"{name}, bf16"] = job(exports[name], dtype="bfloat16")
        jobs[f"{name}, fp8"] = job(exports[name], dtype="bfloat16", quantization="fp8_per_channel")
    jobs["int8"] = job(exports["kraken"], dtype="bfloat16", quantization="int8_per_channel_weight_only")
    return in_vllm(jobs, tmp_path_factory.mktemp("jobs"))


def job(folder: Path, **settings: Any) -> Job:
    return Job({**SETTINGS, "model": str(folder), **settings}, [PROMPTS, PROMPTS])


def in_vllm(jobs: dict[str, Job], folder: Path) -> dict[str, Outcome]:
    return dict(zip(jobs, run_jobs(PYTHON, list(jobs.values()), folder), strict=True))


def require_tokens(outcome: Outcome, expected: list[list[int]]) -> None:
    assert outcome.error is None, outcome.error
    for answer in outcome.answers:
        assert answer.tokens == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_one_rank(name: str, one_rank: dict[str, Outcome], expected: Expected) -> None:
    """With continuous batching, prompts in pieces and prompts whose beginning is cached."""
    require_tokens(one_rank[name], expected(name))
    again = zip(one_rank[name].answers[1].cached, PROMPTS, strict=True)
    assert all(cached > 0 for cached, (prompt, _) in again if len(prompt) > SETTINGS["block_size"])


@pytest.mark.parametrize("name", CONFIGS)
def test_our_engine(name: str, exports: dict[str, Path], expected: Expected) -> None:
    assert of_our_engine(exports[name], PROMPTS) == expected(name)


def test_compiled(one_rank: dict[str, Outcome], expected: Expected) -> None:
    require_tokens(one_rank["compiled"], expected(COMPILED))


def test_without_the_plugin(
    exports: dict[str, Path], expected: Expected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the file that travels, in vLLM's own Transformers backend."""
    monkeypatch.setenv("VLLM_PLUGINS", "none")
    names = ("kraken", "kraken-wide", "standard")
    untied = write_served(tmp_path / "untied", CONFIGS["kraken-wide"].replace(tie_embeddings=False))
    jobs = {name: job(exports[name], trust_remote_code=True) for name in names}
    outcomes = in_vllm({**jobs, "untied": job(untied, trust_remote_code=True)}, tmp_path)
    for name in names:
        require_tokens(outcomes[name], expected(name))
    refusal = outcomes["untied"].error
    assert refusal is not None
    assert "makes a head of hidden_size=64 inputs, and this one has embedding_size=96; install the plugin" in refusal


def test_trusting_remote_code_changes_nothing(one_rank: dict[str, Outcome], expected: Expected) -> None:
    require_tokens(one_rank["trusted"], expected("kraken"))


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_rounded_weights(
    name: str, kind: str, exports: dict[str, Path], one_rank: dict[str, Outcome], expected: Expected
) -> None:
    """The first token of each prompt, of 131, is mostly that of transformers with weights and inputs of such steps."""
    outcome = one_rank[f"{name}, {kind}"]
    assert outcome.error is None, outcome.error
    first = [tokens[0] for tokens in outcome.answers[0].tokens]
    call = [(prompt, 1) for prompt, _ in PROMPTS]
    answers = of_transformers(exports[name], call, in_fp8=True) if kind == "fp8" else expected(name)
    wanted = [tokens[0] for tokens in answers]
    assert sum(a == b for a, b in zip(first, wanted, strict=True)) > len(wanted) / 2


def test_a_quantization_that_changes_nothing_is_refused(one_rank: dict[str, Outcome]) -> None:
    error = one_rank["int8"].error
    assert error is not None
    assert "--quantization int8_per_channel_weight_only leaves all linear maps of this model as they are" in error


@pytest.mark.parametrize("name", OF_TWO_RANKS)
def test_two_ranks(name: str, exports: dict[str, Path], expected: Expected, tmp_path: Path) -> None:
    jobs = {name: job(exports[name], tensor_parallel_size=2)}
    require_tokens(in_vllm(jobs, tmp_path)[name], expected(name))


@pytest.mark.parametrize("name", OF_FOUR_RANKS)
def test_four_ranks(name: str, exports: dict[str, Path], expected: Expected, tmp_path: Path) -> None:
    """A sub-layer, or a head, for each rank."""
    jobs = {name: job(exports[name], tensor_parallel_size=4)}
    require_tokens(in_vllm(jobs, tmp_path)[name], expected(name))


def test_two_ranks_compiled(exports: dict[str, Path], expected: Expected, tmp_path: Path) -> None:
    jobs = {"compiled": job(exports["kraken"], tensor_parallel_size=2, enforce_eager=False)}
    require_tokens(in_vllm(jobs, tmp_path)["compiled"], expected("kraken"))


def test_ranks_that_do_not_divide_the_sub_layers_are_refused(exports: dict[str, Path], tmp_path: Path) -> None:
    jobs = {"kraken": job(exports["kraken"], tensor_parallel_size=3)}
    error = in_vllm(jobs, tmp_path)["kraken"].error
    assert error is not None
    assert "--tensor-parallel-size 3 does not divide num_sub_layers=4" in error
    assert "use 1, 2 or 4" in error


# ---------------------------------------------------------------------------------------------------------------
# The server, and lm-evaluation-harness
# ---------------------------------------------------------------------------------------------------------------


def write_with_tokenizer(folder: Path, tokenizer_dir: Path, vocab_size: int) -> Path:
    """With a tokenizer of 320 tokens."""
    config = KrakenConfig(
        2, hidden_size=64, heads_per_sub_layer=2, vocab_size=vocab_size, context_length=CONTEXT, num_layers=3
    )
    return write_served(folder, config, tokenizer_dir)


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """With 64 rows of the embedding that are no tokens."""
    return write_with_tokenizer(tmp_path_factory.mktemp("with_tokenizer") / "export", tokenizer_dir, 384)


@pytest.fixture(scope="module")
def server(with_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a vLLM that serves it."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(with_tokenizer)]
    command += ["--served-model-name", "kraken", "--port", str(port), "--host", "127.0.0.1"]
    command += ["--dtype", "float32", "--enforce-eager"]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment(1))
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, log.read_text()[-8000:]
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{address}/health", timeout=10).status == 200
        return False

    try:
        wait_until(answers)
        yield address
    finally:
        process.terminate()
        process.wait(PATIENCE)


def ask(address: str, **question: Any) -> str:
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps({"model": "kraken", "temperature": 0, **question}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return answer.read().decode()


def test_server_with_logprobs_and_streaming(server: str, with_tokenizer: Path) -> None:
    prompt, tokens = "The river bends", 16
    tokenizer = load_tokenizer(with_tokenizer / "tokenizer")
    (ids,) = map(list, tokenizer.encode_batch([prompt]))
    model = modeling_kraken.KrakenForCausalLM.from_pretrained(with_tokenizer).eval()
    output = model.generate(
        torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, eos_token_id=None, return_dict_in_generate=True,
        output_scores=True,
    )  # fmt: skip
    new = output.sequences[0, len(ids) :].tolist()
    assert max(new) < tokenizer.vocab_size

    question = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "logprobs": 2, "return_token_ids": True}
    answer = json.loads(ask(server, **question))["choices"][0]
    assert answer["token_ids"] == new
    wanted = [float(scores[0].log_softmax(-1).max()) for scores in output.scores]
    assert answer["logprobs"]["token_logprobs"] == pytest.approx(wanted, abs=1e-4)

    lines = ask(server, **question, stream=True).splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    pieces = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert len(pieces) > 1
    assert "".join(piece["text"] for piece in pieces) == answer["text"]
    assert [token for piece in pieces for token in piece["token_ids"]] == new


TASK = """
task: yes_or_no
dataset_path: json
dataset_kwargs: {data_files: {validation: DATA}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{passage}}\\nQuestion: {{question}}?\\nAnswer:"
doc_to_choice: ["no", "yes"]
doc_to_target: label
metric_list: [{metric: acc}]
"""


def test_lm_eval_finds_what_it_finds_with_transformers(tokenizer_dir: Path, tmp_path: Path) -> None:
    """The questions have the form of SuperGLUE's BoolQ; lm-evaluation-harness runs in vLLM's environment."""
    export = write_with_tokenizer(tmp_path / "export", tokenizer_dir, 320)
    data = tmp_path / "questions.jsonl"
    words = ["mill", "kraken", "river", "ice", "wheel", "number"]
    questions = [
        {"passage": f"The {a} was near the {b}.", "question": f"was the {b} near the {a}", "label": (i + j) % 2}
        for i, a in enumerate(words)
        for j, b in enumerate(words)
    ]
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "yes_or_no.yaml").write_text(TASK.replace("DATA", str(data)))
    found = {}
    for kind, arguments in {
        "hf": f"pretrained={export},trust_remote_code=True,dtype=float32",
        "vllm": f"pretrained={export},dtype=float32,enforce_eager=True,max_model_len={CONTEXT}",
    }.items():
        output = tmp_path / kind
        command = [str(PYTHON), "-m", "lm_eval", "--model", kind, "--model_args", arguments, "--tasks", "yes_or_no"]
        command += ["--include_path", str(tmp_path), "--output_path", str(output), "--log_samples", "--batch_size", "8"]
        command += ["--device", "cpu"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(1))
        assert done.returncode == 0, done.stderr[-8000:]
        (samples,) = output.rglob("samples_*.jsonl")
        found[kind] = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda s: s["doc_id"])
    assert len(found["hf"]) == len(questions)
    assert [sample["acc"] for sample in found["vllm"]] == [sample["acc"] for sample in found["hf"]]
    likelihoods = {
        kind: [float(answer[0]) for sample in samples for answer in sample["filtered_resps"]]
        for kind, samples in found.items()
    }
    assert likelihoods["vllm"] == pytest.approx(likelihoods["hf"], abs=1e-3)
    assert all(math.isfinite(value) for value in likelihoods["hf"])


# ---------------------------------------------------------------------------------------------------------------
# The benchmark
# ---------------------------------------------------------------------------------------------------------------


def test_times_of_a_kraken_with_and_without_overlap(tmp_path: Path) -> None:
    settings = ["sizes=[tiny]", "architectures=[kraken]", "degrees=[2]", "contexts=[16]", "output_tokens=3"]
    settings += [
        "repeats=2",
        "vocab_size=128",
        "dtype=fp32",
        "eager=true",
        f"output_dir={tmp_path}",
        f"python={PYTHON}",
    ]
    result = run_here("kraken_train.bench.vllm", *settings)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "vllm.json").read_text())["results"]
    assert [times["overlap"] for times in found] == [True, False]
    assert all(times[kind]["seconds"] > 0 for times in found for kind in ("ttft", "time_per_output_token"))
