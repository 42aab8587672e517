"""Generation: the tokens of the whole forward pass, whatever the batch, and settings that mean what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import random_ids, rough_model, run_here, small_configs, user_error, write_small_export

from checkpoints.exports.folder import read_export
from kraken_train.common.errors import CheckpointError, ConfigError
from kraken_train.inference import generation, serving
from kraken_train.inference.engine import InferenceEngine
from kraken_train.inference.generation import continue_prompts, require_servable
from kraken_train.inference.sampling import Sampling, draw
from kraken_train.model.language_model import LanguageModel

ARCHITECTURES = list(small_configs())
GREEDY = Sampling(temperature=0.0)
LENGTHS = [5, 1, 8, 3]


def random_prompts(config_name: str) -> list[list[int]]:
    ids = random_ids(small_configs()[config_name], len(LENGTHS), max(LENGTHS))
    return [row[:length] for row, length in zip(ids.tolist(), LENGTHS, strict=True)]


def generate(
    model: LanguageModel, prompts: list[list[int]], new: int, sampling: Sampling = GREEDY, **settings: int
) -> list[list[int]]:  # fmt: skip
    engine = InferenceEngine(model, len(prompts), max(map(len, prompts)) + new)
    return continue_prompts(engine, prompts, new, sampling, **settings)


def continue_slowly(model: LanguageModel, prompt: list[int], new: int, sampling: Sampling, row: int) -> list[int]:
    """One row by itself, with the whole forward pass for each token."""
    ids, generator = torch.tensor([prompt]), sampling.generator(row)
    for _ in range(new):
        ids = torch.cat([ids, draw(model(ids)[:, -1], sampling, [generator])[:, None]], dim=1)
    return ids[0].tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=5.0, seed=3)], ids=["greedy", "sampled"])
def test_tokens_of_the_whole_forward(architecture: str, sampling: Sampling) -> None:
    """In a batch of unequal prompts each row is continued as it is alone."""
    model, prompts = rough_model(small_configs()[architecture]), random_prompts(architecture)
    with torch.no_grad():
        expected = [continue_slowly(model, prompt, 10, sampling, row) for row, prompt in enumerate(prompts)]
    assert generate(model, prompts, 10, sampling) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_in_bf16(architecture: str) -> None:
    """Each token is the most likely one after those before it, up to bf16's rounding: equal logits are common."""
    config = small_configs()[architecture]
    model = rough_model(config, torch.bfloat16)
    ids = torch.tensor(generate(model, random_ids(config, 3, 5).tolist(), 19))
    logits = model.double()(ids[:, :-1])[:, 4:]
    chosen = logits.gather(-1, ids[:, 5:, None])[..., 0]
    behind = (logits.max(dim=-1).values - chosen) / logits.abs().amax(dim=-1)
    assert behind.max() < 0.03
    assert (behind == 0).double().mean() > 0.8


def test_what_is_drawn_follows_seed_and_row() -> None:
    model, prompts = rough_model(small_configs()["kraken"]), random_prompts("kraken")

    def run(rows: list[list[int]], seed: int, first_row: int = 0) -> list[list[int]]:
        return generate(model, rows, 12, Sampling(temperature=5.0, seed=seed), first_row=first_row)

    together = run(prompts, 1)
    assert together == run(prompts, 1) != run(prompts, 2)
    assert together == run(prompts[:1], 1) + run(prompts[1:3], 1, first_row=1) + run(prompts[3:], 1, first_row=3)
    twice = run([prompts[0]] * 2, 1)
    assert twice[0] == together[0] != twice[1]


def test_the_whole_context_can_be_used() -> None:
    (row,) = generate(rough_model(small_configs()["kraken"]), [[7]], 23)
    assert len(row) == 24


def test_end_of_document_stops_a_row_and_then_all() -> None:
    config = small_configs()["kraken"]
    model, prompts = rough_model(config), random_ids(config, 2, 4).tolist()
    free = generate(model, prompts, 8)
    end = free[0][6]  # the first row's third new token
    stopped = generate(model, prompts, 8, end_of_document=end)
    for row, whole in zip(stopped, free, strict=True):
        new = whole[4:]
        assert row == whole[: 4 + new.index(end) + 1] if end in new else whole

    passes: list[int] = []
    model.final_norm.register_forward_pre_hook(lambda *_: passes.append(1))
    alone = generate(model, prompts[:1], 8, end_of_document=end)
    assert alone == stopped[:1]
    assert len(passes) == len(alone[0]) - 4


def test_padding_of_the_vocabulary_is_never_drawn() -> None:
    model = rough_model(small_configs()["kraken"])
    (row,) = generate(model, [[0]], 20, Sampling(temperature=100.0), vocab_size=5)
    assert max(row) < 5


def test_limits_of_sampling() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, 4)

    def check(*expected: float, **settings: float) -> None:
        sampling = Sampling(seed=3, **settings)  # type: ignore[arg-type]
        drawn = draw(logits, sampling, [sampling.generator(0)] * len(logits))
        for i, probability in enumerate(expected):
            frequency = float((drawn == i).float().mean())
            assert frequency == probability or (abs(frequency - probability) < 0.04 and 0 < probability < 1)

    check(0.5, 0.3, 0.15, 0.05)
    check(1, 0, 0, 0, top_k=1)
    check(0.625, 0.375, 0, 0, top_k=2)
    check(0.5, 0.3, 0.15, 0.05, top_k=9)
    check(1, 0, 0, 0, top_p=0.4)
    check(0.625, 0.375, 0, 0, top_p=0.6)
    check(0.5, 0.3, 0.15, 0.05, top_p=1.0)
    check(1, 0, 0, 0, top_k=2, top_p=0.6)
    check(1, 0, 0, 0, temperature=0.01)
    check(0.685, 0.247, 0.062, 0.007, temperature=0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_tokens_of_multinomial(dtype: torch.dtype) -> None:
    """A seed draws what earlier versions drew, row by row on the CPU."""
    sampling = Sampling(temperature=0.7, seed=9)
    ours, theirs = ([sampling.generator(row) for row in range(40)] for _ in range(2))
    for _ in range(3):
        logits = torch.randn(40, 3000, generator=ours[0]).to(dtype)
        theirs[0].set_state(ours[0].get_state())
        chances = (logits.to(torch.promote_types(dtype, torch.float32)) / 0.7).softmax(dim=-1)
        expected = [
            torch.multinomial(row, 1, generator=generator) for row, generator in zip(chances, theirs, strict=True)
        ]
        assert draw(logits, sampling, ours).equal(torch.cat(expected))


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=5.0, seed=3)], ids=["greedy", "sampled"])
def test_tokens_are_read_in_blocks(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text does not depend on how many are read at a time, and the passes go on until a read shows the end."""
    model, prompts = rough_model(small_configs()["kraken"]), random_prompts("kraken")[:2]
    reads, passes = [], []

    def counted(unread: list[torch.Tensor]) -> list[list[int]]:
        reads.append(len(unread))
        return torch.stack(unread).tolist()

    monkeypatch.setattr(generation, "read", counted)
    model.final_norm.register_forward_pre_hook(lambda *_: passes.append(1))
    free = generate(model, prompts, 10, sampling)
    assert reads == [1] * 10
    for size, expected in ((4, [4, 4, 2]), (10, [10]), (99, [10])):
        reads.clear()
        assert generate(model, prompts, 10, sampling, tokens_per_read=size) == free
        assert reads == expected
    end = free[0][7]
    stopped = generate(model, prompts[:1], 10, sampling, end_of_document=end)
    first = len(stopped[0]) - len(prompts[0])
    reads.clear()
    passes.clear()
    assert generate(model, prompts[:1], 10, sampling, end_of_document=end, tokens_per_read=4) == stopped
    assert sum(reads) == len(passes) == min(10, -(-first // 4) * 4)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=3)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_any_logit_that_is_not_finite(sampling: Sampling, value: float) -> None:
    """Also of a token that would never be drawn, and before the tokens of its block are taken."""
    model = rough_model(small_configs()["standard"])
    with torch.no_grad():
        model.token_embedding.weight[95, 0] = value
    for settings in ({}, {"vocab_size": 5, "tokens_per_read": 3}):
        with pytest.raises(CheckpointError, match="the model's predictions are not finite"):
            generate(model, [[1, 2], [3]], 8, sampling, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"seed": -1}, "seed=-1 must be at least 0 and less than"),
        ({"seed": 2**63}, "seed=9223372036854775808 must be at least 0 and less than"),
        ({"top_k": 0}, "top_k=0 must be greater than 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be greater than 0"),
        ({"top_p": 1.5}, "top_p=1.5 must be greater than 0 and at most 1"),
    ],
)
def test_wrong_sampling(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)  # type: ignore[arg-type]


def test_prompts_that_cannot_be_served() -> None:
    config = small_configs()["kraken"]
    require_servable([0, 95], 22, config)
    for prompt, new, message in (
        ([], 1, "line 3 has no tokens"),
        ([1] * 24, 1, "line 3 has 24 tokens, which leaves no room in the model's context of 24; use at most 23"),
        ([1] * 5, 20, "max_new_tokens=20 after the 5 tokens of line 3 exceeds .* context of 24; use at most 19"),
        ([1, 96], 1, "line 3 has the token 96, and the model's vocabulary has the tokens 0 to 95"),
        ([-1], 1, "line 3 has the token -1"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            require_servable(prompt, new, config, "line 3")


def test_a_diverged_model() -> None:
    model = rough_model(small_configs()["kraken"])
    torch.nn.init.constant_(model.final_norm.weight, torch.nan)
    with pytest.raises(CheckpointError, match="not finite"):
        generate(model, [[1, 2]], 2)


# ---------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def export_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "an export, (1)"
    write_small_export(folder, small_configs(vocab_size=384, context_length=64)["kraken"], tokenizer_dir)
    return folder


def test_command(export_dir: Path, tmp_path: Path) -> None:
    def run(*settings: str) -> str:
        result = run_here("kraken_train.generate", f"export_dir={export_dir}", "max_new_tokens=8", *settings)
        assert result.returncode == 0, result.stderr
        return result.stdout

    prompt = "Once, (upon) a ${time}\\"
    sampled = run(f"prompt={prompt}", "seed=3")
    assert sampled.startswith(prompt)
    assert len(sampled) > len(prompt) + 1
    assert run(f"prompt={prompt}", "seed=3", "prefill_lengths=[4,40]", "devices=[2.0]") == sampled

    (tmp_path / "prompts, (1)").write_text(f"{prompt}\nThe\u2028river\nThe\u2028river\n")
    texts = [run(f"prompts_file={tmp_path / 'prompts, (1)'}", "seed=3", f"batch_size={size}") for size in (1, 2, 8)]
    assert texts[0] == texts[1] == texts[2]
    first, second, third = map(json.loads, texts[0].removesuffix("\n").split("\n"))
    assert first + "\n" == sampled
    assert second.startswith("The\u2028river")
    assert third.startswith("The\u2028river")
    assert second != third


def test_an_empty_prompt_begins_a_document(export_dir: Path) -> None:
    export = read_export(export_dir)
    tokenizer = export.load_tokenizer()
    (row,) = generate(export.load_model(), [[tokenizer.end_of_document]], 8, vocab_size=tokenizer.vocab_size)
    result = run_here(
        "kraken_train.generate", f"export_dir={export_dir}", "prompt=", "max_new_tokens=8", "temperature=0"
    )
    assert (result.returncode, result.stdout) == (0, tokenizer.decode(row[1:]) + "\n"), result.stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "give either prompt=TEXT or prompts_file=FILE"),
        (["prompt=a", "prompts_file=b"], "give either prompt=TEXT or prompts_file=FILE"),
        (["prompts_file=nowhere"], "prompts_file=nowhere does not exist; name a file"),
        (["prompt=" + "Once upon a time" * 9], "leaves no room in the model's context of 64"),
        (["prompt=a", "devices=[1,1]"], "has the speeds of 2 devices, but there are 1 ranks; start 2 ranks"),
        (["prompt=a", "devices=[0]"], "devices=0.0 must be greater than 0"),
        (["prompt=a", "prefill_lengths=[65]"], "prefill_lengths=[65] pads a prompt of"),
        (["prompt=a", "cuda_graphs=true", "device=cpu"], "cuda_graphs=true needs a GPU"),
        (["prompt=a", "batch_size=0"], "batch_size=0 must be greater than 0"),
        (["prompt=a", "dtype=int8"], "dtype=int8 is not known; use float32 or bfloat16"),
    ],
)
def test_wrong_settings(export_dir: Path, settings: list[str], message: str) -> None:
    base = [f"export_dir={export_dir}", "max_new_tokens=4"]
    assert message in user_error(run_here("kraken_train.generate", *base, *settings))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; write one prompt a line"),
        (b"The river\n\nThe sea\n", "line 2 of prompts_file="),
        (b"The river\xff", "is not valid UTF-8 (byte 9)"),
    ],
)
def test_wrong_files_of_prompts(export_dir: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "prompts").write_bytes(content)
    settings = [f"export_dir={export_dir}", f"prompts_file={tmp_path / 'prompts'}", "max_new_tokens=4"]
    assert message in user_error(run_here("kraken_train.generate", *settings))


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"\xef\xbb\xbfone\r\ntwo \r\n", ["one", "two "]),  # as some editors write
        ("a\rb\u2028c\x85d\ne".encode(), ["a\rb\u2028c\x85d", "e"]),
    ],
)
def test_files_of_prompts(export_dir: Path, tmp_path: Path, content: bytes, prompts: list[str]) -> None:
    """Characters that only look like the end of a line are text, as in preparation."""
    (tmp_path / "prompts").write_bytes(content)
    settings = [f"export_dir={export_dir}", f"prompts_file={tmp_path / 'prompts'}", "max_new_tokens=1"]
    result = run_here("kraken_train.generate", *settings)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.split("\n") if line]
    assert len(lines) == len(prompts)
    assert all(line.startswith(prompt) for line, prompt in zip(lines, prompts, strict=True))


def test_too_little_memory_is_told_before_anything_is_loaded(export_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object) -> None:
        raise AssertionError("the weights are read although there is no room for them")

    monkeypatch.setattr(serving, "free_memory", lambda device, processes: 1000)
    monkeypatch.setattr(serving, "load_part", load)
    settings = [f"export_dir={export_dir}", "prompt=The river", "max_new_tokens=4"]
    message = user_error(run_here("kraken_train.generate", *settings))
    assert "does not fit into memory: device 0 needs" in message
    assert "GiB free; use more devices" in message
