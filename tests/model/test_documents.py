"""Documents apart: against documents run one by one, without a bit that leaks, and each kernel against the mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import random_ids, rough_model, small_configs
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask

from kraken_train.inference.kv_cache import KeyValueCache
from kraken_train.model import documents
from kraken_train.model.config import KrakenConfig
from kraken_train.model.cross_entropy import IGNORED
from kraken_train.model.documents import BLOCK, KERNELS, Documents, block_mask
from kraken_train.model.flops import attention_flops_per_token
from kraken_train.model.language_model import LanguageModel

CONFIGS = small_configs()
END = 5
# The lengths of the documents of each sample, the end token before them included. The first one of a sample may lack
# its beginning.
LENGTHS = ((7, 1, 9, 7), (24,), (3, 20, 1))


def samples(lengths: tuple[tuple[int, ...], ...] = LENGTHS, cut: bool = True) -> Tensor:
    """Token ids (B, T) of documents that begin with END; `cut`: but for the first of a sample."""
    total = sum(lengths[0])
    ids = random_ids(CONFIGS["kraken"], len(lengths), total)
    ids[ids == END] = END + 1
    for row, of_row in zip(ids, lengths, strict=True):
        assert sum(of_row) == total
        starts = torch.tensor((0, *of_row[:-1])).cumsum(0)
        row[starts[1:] if cut else starts] = END
    return ids


def targets_of(ids: Tensor) -> Tensor:
    """The next tokens, the last one of a sample being predicted too."""
    return torch.cat([ids[:, 1:], ids[:, :1]], dim=1)


def apart(name: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    model = rough_model(CONFIGS[name], dtype)
    model.end_of_document = END
    return model


def spans() -> list[tuple[int, int, int]]:
    """(sample, first token, after the last one) of each document."""
    found = []
    for row, of_row in enumerate(LENGTHS):
        ends = torch.tensor(of_row).cumsum(0).tolist()
        found += [(row, end - length, end) for end, length in zip(ends, of_row, strict=True)]
    return found


def test_positions() -> None:
    ids = torch.tensor([[1, 2, END, 3, END, END, 4], [END, 1, 2, 3, 4, 6, 7]])
    found = Documents.of(ids, END)
    assert found.begins.tolist() == [[0, 0, 2, 2, 4, 5, 5], [0] * 7]
    assert found.positions.tolist() == [[0, 1, 0, 1, 0, 0, 1], list(range(7))]


@pytest.mark.parametrize("name", ["kraken-gqa", "standard"])
def test_flops(name: str) -> None:
    """The documents of a sample take what samples of their lengths would take."""
    config, tokens = CONFIGS[name], sum(LENGTHS[0])
    attended = Documents.of(samples()[:1], END).attended.item()
    alone = sum(length * attention_flops_per_token(config, length / 2) for length in LENGTHS[0])
    assert tokens * attention_flops_per_token(config, attended) == pytest.approx(alone, rel=1e-12)
    assert attention_flops_per_token(config, config.context_length / 2) == attention_flops_per_token(config)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("recompute", [False, True])
def test_equal_to_documents_one_by_one(name: str, recompute: bool) -> None:
    ids = samples()
    targets = targets_of(ids)
    targets[0, 3:5] = IGNORED
    together, alone = apart(name), rough_model(CONFIGS[name])
    together.recompute = recompute
    logits = together(ids)
    together.loss(ids, targets).backward()
    counted = (targets != IGNORED).sum()
    for row, first, end in spans():
        of_document, wanted = ids[row : row + 1, first:end], targets[row : row + 1, first:end]
        assert (logits[row, first:end] - alone(of_document)[0]).abs().max() < 1e-12
        (F.cross_entropy(alone(of_document)[0], wanted[0], reduction="sum") / counted).backward()
    for (parameter_name, parameter), expected in zip(together.named_parameters(), alone.parameters(), strict=True):
        assert (parameter.grad - expected.grad).abs().max() < 1e-12 * expected.grad.abs().max(), parameter_name


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_leaks(name: str, dtype: torch.dtype) -> None:
    """Other documents of the sample change no bit of a document's logits, nor of what its tokens give to gradients."""
    ids = samples()
    others = samples()
    others += 1 + (others > END).long() * 7  # other tokens, where no document begins
    others[others == END] = END + 1
    others %= CONFIGS[name].vocab_size
    model = apart(name, dtype)
    for row, first, end in spans():
        changed = others.clone()
        changed[ids == END] = END
        changed[row, first:end] = ids[row, first:end]
        assert (changed != ids).sum() > 20
        for found, expected in zip(of_document(model, changed, row, first, end),
                                   of_document(model, ids, row, first, end), strict=True):  # fmt: skip
            assert torch.equal(found, expected)


def of_document(model: LanguageModel, ids: Tensor, row: int, first: int, end: int) -> list[Tensor]:
    """Logits, loss and gradients of all weights of one document's targets; the others do not count."""
    targets = torch.full_like(ids, IGNORED)
    targets[row, first:end] = targets_of(samples())[row, first:end]
    model.zero_grad()
    loss = model.loss(ids, targets)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return [model(ids)[row, first:end].detach(), loss.detach(), *gradients]  # type: ignore[list-item]


def test_without_it_documents_leak() -> None:
    """What the test above would see."""
    model, ids = rough_model(CONFIGS["kraken"], torch.float32), samples()
    changed = ids.clone()
    changed[0, 0] += 1
    assert not torch.equal(model(ids)[0, -1], model(changed)[0, -1])


def test_many_blocks() -> None:
    """More tokens than the blocks in which a kernel computes, with NaN for what no token of the last document sees."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 1200, 8, generator=generator).unbind()
    begins = Documents.of(torch.tensor([[0] * 900 + [END] + [1] * 299] * 2), END).begins
    store = KERNELS["mask"](begins, 1, torch.float32)
    expected = F.scaled_dot_product_attention(*(part[:, :, 900:] for part in (query, key, value)), is_causal=True)
    found = store.attend(query, key, value)
    torch.testing.assert_close(found[:, :, 900:], expected)
    for part in (key, value):
        part[:, :, :900] = torch.randn(2, 2, 900, 8, generator=generator) * 1e6
    assert torch.equal(store.attend(query, key, value)[:, :, 900:], found[:, :, 900:])


def random_begins(tokens: int, mean: int, rows: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(tokens + mean)
    return Documents.of((torch.rand(rows, tokens, generator=generator) > 1 / mean).long(), 0).begins


@pytest.mark.parametrize("tokens", [1, 100, BLOCK, 3 * BLOCK, 5 * BLOCK + 37])
@pytest.mark.parametrize("mean", [3, 60, 300, 10**9])
def test_block_mask(tokens: int, mean: int) -> None:
    """As PyTorch makes it from all T x T values."""
    begins = random_begins(tokens, mean)
    found = block_mask(begins)
    expected = create_block_mask(found.mask_mod, 3, None, tokens, tokens, device="cpu", BLOCK_SIZE=BLOCK)
    assert found.seq_lengths == expected.seq_lengths
    assert found.BLOCK_SIZE == expected.BLOCK_SIZE
    for name in ("kv", "full_kv", "q", "full_q"):
        counts, wanted = getattr(found, f"{name}_num_blocks"), getattr(expected, f"{name}_num_blocks")
        assert torch.equal(counts, wanted), name
        places, wanted_places = getattr(found, f"{name}_indices"), getattr(expected, f"{name}_indices")
        chosen = torch.arange(places.shape[-1]) < counts[..., None]
        assert torch.equal(places[chosen], wanted_places[chosen]), name


def plain_varlen(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, *_: Any, **options: Any) -> Tensor:
    """In place of the kernel for GPUs: one document after the other."""
    assert options == {"window_size": (-1, 0), "enable_gqa": query.shape[1] > key.shape[1]}
    parts = []
    for first, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        of_document = (part[first:end].transpose(0, 1)[None] for part in (query, key, value))
        parts.append(F.scaled_dot_product_attention(*of_document, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kernel", ["flex", "varlen"])
@pytest.mark.parametrize("groups", [4, 2])
def test_kernels_of_gpus(kernel: str, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their masks and layouts, on a CPU; see test_documents_gpu.py for what runs on GPUs."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen)
    # FlexAttention refuses gradients on a CPU, although its plain form computes them.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    compare_kernel(kernel, groups, torch.device("cpu"), torch.float32)


def compare_kernel(kernel: str, groups: int, device: torch.device, dtype: torch.dtype) -> None:
    """Output and gradients of a kernel against those of the mask, for 2 sub-layers."""
    generator = torch.Generator().manual_seed(1)
    begins = random_begins(200, 40)
    inputs = [torch.randn(6, heads, 200, 16, generator=generator) for heads in (4, groups, groups)]
    seed = torch.randn(6, 4, 200, 16, generator=generator)
    results = {}
    for name, where, of in (("mask", torch.device("cpu"), torch.float64), (kernel, device, dtype)):
        leaves = [part.to(where, of).requires_grad_() for part in inputs]
        mixed = KERNELS[name](begins.to(where), 2, of).attend(*leaves)
        mixed.backward(seed.to(where, of))
        results[name] = [mixed, *(leaf.grad for leaf in leaves)]
    for found, expected in zip(results[kernel], results["mask"], strict=True):
        tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found.cpu().double(), expected, rtol=tolerance, atol=tolerance)


def test_flex_in_compiled_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One compilation of the attention serves all layers and batches, with recomputation too."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    config = KrakenConfig(3, 3, hidden_size=32, heads_per_sub_layer=2, vocab_size=96, context_length=150)
    model = rough_model(config, torch.float32)
    model.end_of_document = END
    batches = [random_ids(config, 2, 150, seed) for seed in range(3)]
    expected = [model.loss(ids, ids).item() for ids in batches]
    monkeypatch.setitem(KERNELS, "mask", documents.FlexAttention)
    model.recompute = True
    torch._dynamo.reset()
    compiled: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    for layer in model.layers:
        layer.attention.compile(backend=count)  # type: ignore[operator, union-attr]
    for ids, of_mask in zip(batches, expected, strict=True):
        loss = model.loss(ids, ids)
        loss.backward()
        assert loss.item() == pytest.approx(of_mask, rel=1e-5)
    assert len(compiled) == 1


@pytest.mark.parametrize("name", ["kraken", "standard-gqa"])
def test_made_once_for_all_layers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training with recomputation too: a layer only attends."""
    made: list[tuple[int, ...]] = []

    class Counted(documents.MaskedAttention):
        def __init__(self, begins: Tensor, *more: Any) -> None:
            made.append(tuple(begins.shape))
            super().__init__(begins, *more)

    monkeypatch.setitem(KERNELS, "mask", Counted)
    model, ids = apart(name), samples()
    model.recompute = True
    model.loss(ids, ids).backward()
    assert made == [ids.shape]


def test_caches_hold_one_sequence() -> None:
    """Generation continues what it was given."""
    model, plain, ids = apart("kraken"), rough_model(CONFIGS["kraken"]), samples()
    with torch.no_grad():
        found = model(ids, KeyValueCache(model, len(ids), ids.shape[1]).prefill)
        torch.testing.assert_close(found, plain(ids), rtol=0, atol=0)
