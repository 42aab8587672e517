"""The engine in one process against the whole forward pass of the same model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden import Golden
from helpers import random_ids, rough_model, small_configs
from torch import Tensor
from torch.nn import functional as F

from kraken_train.common.errors import ConfigError
from kraken_train.inference import engine as engine_module
from kraken_train.inference.engine import ExecutionConfig, InferenceEngine
from kraken_train.inference.graphs import WARM_UP_RUNS
from kraken_train.model import attention_backends
from kraken_train.model.language_model import LanguageModel

CONFIGS = small_configs(context_length=72)
LENGTHS = [5, 1, 7, 3]  # of prompts
STEPS = 64


def continued(engine: InferenceEngine, ids: Tensor, lengths: list[int], steps: int, padding: int = 0) -> list[Tensor]:
    """Logits (B, V) after prompts, the first tokens of the rows of `ids`, and after each of their next `steps`."""
    batch, longest = len(lengths), max(lengths) + padding
    logits = [engine.prefill(ids[:batch, :longest], torch.tensor(lengths))]
    for step in range(steps):
        logits.append(engine.decode(ids[range(batch), [length + step for length in lengths]]))
    return logits


def error(found: list[Tensor], expected: Tensor, lengths: list[int]) -> float:
    """Largest difference from logits of the whole sequences (B, T, V), relative to the largest of these."""
    rows = range(len(lengths))
    differences = [
        logits - expected[rows, [length - 1 + step for length in lengths]] for step, logits in enumerate(found)
    ]
    return float(torch.stack(differences).abs().max() / expected.abs().max())


def whole_logits(model: LanguageModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids)


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_logits(architecture: str, dtype: torch.dtype, tolerance: float) -> None:
    config = CONFIGS[architecture]
    model, ids = rough_model(config, dtype), random_ids(config, 4, 72)
    expected = whole_logits(model, ids)
    engine = InferenceEngine(model, batch_size=4, capacity=72)
    assert error(continued(engine, ids, LENGTHS, STEPS), expected, LENGTHS) < tolerance
    # What is left of the batch before does not matter, nor that the batch is smaller and padded further.
    assert error(continued(engine, ids, [2, 9], 8, padding=4), expected, [2, 9]) < tolerance


def test_golden_file() -> None:
    golden = Golden()
    tokens = golden.input_ids.shape[1]
    engine = InferenceEngine(golden.model(), len(golden.input_ids), tokens)
    lengths = [1 + row % 3 for row in range(len(golden.input_ids))]
    found = continued(engine, golden.input_ids, lengths, tokens - max(lengths))
    assert len(found) > 4
    for step, logits in enumerate(found):
        expected = golden.logits[range(len(lengths)), [length - 1 + step for length in lengths]]
        assert (logits - expected).abs().max() < 1e-12


def test_prompts_are_padded_to_given_lengths() -> None:
    config = CONFIGS["kraken"]
    model, ids = rough_model(config), random_ids(config, 4, 72)
    execution = ExecutionConfig(prefill_lengths=(4, 8))
    assert [execution.padded(tokens) for tokens in (1, 4, 5, 8, 9)] == [4, 4, 8, 8, 9]
    engine = InferenceEngine(model, 4, 20, execution)
    widths: list[int] = []
    model.token_embedding.register_forward_pre_hook(lambda _, arguments: widths.append(arguments[0].shape[1]))
    expected = whole_logits(model, ids)
    for lengths in ([5, 1, 7, 3], [2, 1, 1, 1], [9, 2, 2, 2]):
        assert error(continued(engine, ids, lengths, 3), expected, lengths) < 1e-12
    assert [width for width in widths if width > 1] == [72, 8, 4, 9]


@pytest.mark.slow
def test_compiled_once() -> None:
    """The same logits, and no compilation after the first token: none for later tokens, one for further lengths."""
    config = CONFIGS["kraken-gqa"]
    ids = random_ids(config, 4, 72)
    expected = whole_logits(rough_model(config, torch.float32), ids)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    engine = InferenceEngine(rough_model(config, torch.float32), 4, 72, ExecutionConfig(compile=True))
    compiled = []
    for lengths, steps in (([5, 1, 7, 3], 2), ([5, 1, 7, 3], 20), ([9, 2, 2, 2], 2), ([12, 2, 2, 2], 2)):
        assert error(continued(engine, ids, lengths, steps), expected, lengths) < 1e-5
        compiled.append(counters["unique_graphs"])
    # Attention and FFN, each for prompts, for new tokens, and then for prompts of any length.
    assert compiled == [4, 4, 6, 6]


class Recorded:
    """Stands for a CUDA graph where there is none: it computes again in its own memory, after real warm-up runs."""

    def __init__(
        self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], pool: object, before: object = None
    ) -> None:
        self.function, self.inputs = function, inputs
        for _ in range(WARM_UP_RUNS):
            if callable(before):
                before()
            function(*inputs)

    def __call__(self, *arguments: Tensor) -> Tensor:
        for own, given in zip(self.inputs, arguments, strict=True):
            assert own.shape == given.shape
            assert own.dtype == given.dtype
            own.copy_(given)
        return self.function(*self.inputs)


@pytest.mark.parametrize("architecture", ["kraken-gqa", "standard"])
def test_what_is_recorded(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of the given lengths and new tokens run on what was recorded; the warm-up leaves no traces."""
    recorded: list[Recorded] = []
    calls: list[int] = []

    class Counting(Recorded):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            recorded.append(self)

        def __call__(self, *arguments: Tensor) -> Tensor:
            calls.append(recorded.index(self))
            return super().__call__(*arguments)

    monkeypatch.setattr(engine_module, "CapturedFunction", Counting)
    monkeypatch.setattr(ExecutionConfig, "require_device", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    config = CONFIGS[architecture]
    model, ids = rough_model(config), random_ids(config, 4, 72)
    expected = whole_logits(model, ids)
    engine = InferenceEngine(model, 4, 12, ExecutionConfig(cuda_graphs=True, prefill_lengths=(4, 8)))
    for lengths in ([5, 1, 7, 3], [2, 3], [9, 2, 2, 2]):
        assert error(continued(engine, ids, lengths, 2), expected, lengths) < 1e-12
    # Recorded are the prompts of 8 and of 4 tokens, then new tokens; prompts of 9 tokens run as they are. The last two
    # are the head's: logits, and the most likely token.
    width = config.hidden_size
    assert [call.inputs[0].shape for call in recorded] == [(4, 8), (4, 4), (4,), (4, width), (4, width)]
    assert calls == [0, 3, 2, 3, 2, 3, 1, 3, 2, 3, 2, 3, 3, 2, 3, 2, 3]
    calls.clear()
    hidden = engine.read_prompts(ids[:2, :4], torch.tensor([4, 2]))
    chosen = engine.most_likely(hidden, vocab_size=50)
    assert chosen.ids.equal(engine.logits(hidden)[:, :50].argmax(dim=-1))
    assert chosen.finite.tolist() == [True, True]
    assert calls == [1, 4, 3]


@pytest.mark.parametrize(("longest", "capacity", "expected"), [
    (1, 51, (51,)), (60, 110, (64,)), (64, 64, (64,)), (65, 99, (64, 96)), (300, 350, (64, 96, 128, 192, 256, 350)),
    (1000, 1024, (64, 96, 128, 192, 256, 384, 512, 768, 1000 + 24)),
])  # fmt: skip
def test_lengths_that_prompts_are_padded_to(longest: int, capacity: int, expected: tuple[int, ...]) -> None:
    """On a GPU, where they are not given; none takes more room than prompt and new tokens do."""
    unset = ExecutionConfig(prefill_lengths=None)
    found = unset.fitted(torch.device("cuda"), longest, capacity)
    assert found.prefill_lengths == expected
    found.validate()
    assert found.padded(longest) == expected[-1]
    assert unset.fitted(torch.device("cpu"), longest, capacity).prefill_lengths == ()
    given = ExecutionConfig(prefill_lengths=(4, 8))
    assert given.fitted(torch.device("cuda"), longest, capacity) is given


def test_attention_makes_plans_for_recorded_shapes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: cuDNN may take what is recorded, but neither other prompts nor new tokens."""
    for module, name, value in (
        (engine_module, "CapturedFunction", Recorded), (ExecutionConfig, "require_device", lambda *_: None),
        (torch.cuda, "graph_pool_handle", lambda: (0, 0)), (attention_backends, "plans_shapes", lambda _: True),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    model = rough_model(CONFIGS["kraken"])
    engine = InferenceEngine(model, 1, 12, ExecutionConfig(cuda_graphs=True, prefill_lengths=(4,)))
    attend, plans = F.scaled_dot_product_attention, []

    def note(*arguments: Any, **options: Any) -> Tensor:
        plans.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", note)
    layers = model.num_layers
    for length, expected in ((3, True), (7, False)):
        plans.clear()
        engine.prefill(torch.ones(1, length, dtype=torch.int64), torch.tensor([length]))
        assert plans == [expected] * layers
        engine.decode(torch.tensor([1]))
        assert plans[layers:] == [False] * layers
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("lengths", [(0, 4), (4, 4), (8, 4)])
def test_wrong_prefill_lengths(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"prefill_lengths=.* must be numbers of tokens, each at least 1 and greater"):
        ExecutionConfig(prefill_lengths=lengths).validate()


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(ConfigError, match="cuda_graphs=true needs a GPU, and this runs on cpu; use cuda_graphs=false"):
        InferenceEngine(rough_model(CONFIGS["kraken"]), 1, 8, ExecutionConfig(cuda_graphs=True))


def test_what_does_not_fit() -> None:
    config = CONFIGS["kraken"]
    model = rough_model(config)
    with pytest.raises(ValueError, match="no cache for 1 x 73 tokens of a context of 72"):
        InferenceEngine(model, 1, 73)
    with pytest.raises(ValueError, match=r"prefill_lengths=\[9\] exceed the capacity 8"):
        InferenceEngine(model, 1, 8, ExecutionConfig(prefill_lengths=(9,)))
    engine = InferenceEngine(model, 2, 8)
    with pytest.raises(ValueError, match="for 0 sequences"):
        engine.decode(torch.tensor([1]))
    for ids, lengths, message in (
        (torch.zeros(3, 4), [1, 1, 1], "do not fit an engine for 2 sequences of 8 tokens"),
        (torch.zeros(2, 9), [1, 1], "do not fit an engine for 2 sequences of 8 tokens"),
        (torch.zeros(2, 4), [1], "do not fit an engine for 2 sequences of 8 tokens"),
        (torch.zeros(2, 4), [1, 5], r"lengths=\[1, 5\] of prompts must be between 1 and 4"),
        (torch.zeros(2, 4), [0, 4], r"lengths=\[0, 4\] of prompts must be between 1 and 4"),
        (torch.full((2, 4), 96), [1, 4], "token ids from 96 to 96: the vocabulary has 0 to 95"),
        (torch.full((2, 4), -1), [1, 4], "token ids from -1 to -1"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.prefill(ids.long(), torch.tensor(lengths))
    engine.prefill(torch.zeros(2, 7, dtype=torch.int64), torch.tensor([7, 2]))
    with pytest.raises(ValueError, match=r"shape \(1,\) for 2 sequences"):
        engine.decode(torch.tensor([1]))
    with pytest.raises(ValueError, match="token ids from 5 to 96"):
        engine.decode(torch.tensor([5, 96]))
    engine.decode(torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="the cache is full: it has room for 8 tokens"):
        engine.decode(torch.tensor([1, 1]))
