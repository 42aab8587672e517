"""Run alone, with `python -I`: what transformers makes of exports where none of our packages can be imported.

Takes a folder of cases. Each has an export, `e`, and in `expected.safetensors` what our model computes. Prints a JSON
object of the largest difference found, by case and check; the test says how large they may be.

Shapes: B batch, T tokens, V vocabulary size.
"""

from __future__ import annotations

import importlib.abc
import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

OURS = ("kraken_train", "checkpoints", "data_prep", "launch")


class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in OURS:
            raise ImportError(f"{name} is blocked")


sys.meta_path.insert(0, Blocker())

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from transformers import (  # noqa: E402
    AttentionInterface,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    StaticCache,
)

PAD = 1
NEW_TOKENS = 6


def load(folder: Path, dtype: torch.dtype = torch.float64, kind: Any = AutoModelForCausalLM, **settings: Any) -> Any:
    return kind.from_pretrained(folder, trust_remote_code=True, dtype=dtype, **settings)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def check_logits(model: Any, ids: Tensor, expected: Tensor) -> dict[str, float]:
    whole = model(ids).logits
    steps = []
    cache = DynamicCache(config=model.config)
    for chunk in ids.split([4, 1, ids.shape[1] - 5], dim=1):
        steps.append(model(chunk, past_key_values=cache).logits)
    static = StaticCache(config=model.config, max_cache_len=ids.shape[1] + 2)
    static_steps = [model(chunk, past_key_values=static).logits for chunk in ids.split([7, ids.shape[1] - 7], dim=1)]
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids), logits_to_keep=3).logits
    return {
        "whole": difference(whole, expected),
        "cache": difference(torch.cat(steps, dim=1), expected),
        "static cache": difference(torch.cat(static_steps, dim=1), expected),
        "embeddings": difference(embedded, expected[:, -3:]),
    }


def check_padding(model: Any, ids: Tensor, expected: Tensor) -> dict[str, float]:
    """Prompts of several lengths, padded on the left to one batch: the logits, and what is generated."""
    lengths = [3, 7, ids.shape[1] - NEW_TOKENS]
    width = max(lengths)
    batch = torch.full((len(lengths), width), PAD)
    mask = torch.zeros_like(batch)
    for row, length in enumerate(lengths):
        batch[row, width - length :] = ids[0, :length]
        mask[row, width - length :] = 1
    logits = model(batch, attention_mask=mask).logits
    cache = DynamicCache(config=model.config)
    first = model(batch[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache).logits
    last = model(batch[:, -1:], attention_mask=mask, past_key_values=cache).logits
    chunked = torch.cat([first, last], dim=1)
    right = model(batch.roll(-(width - 3), dims=1)[:1], attention_mask=mask.roll(-(width - 3), dims=1)[:1]).logits
    greedy = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    together = model.generate(batch, attention_mask=mask, **greedy)[:, width:]
    alone = [model.generate(ids[:1, :length], **greedy)[0, length:] for length in lengths]
    return {
        "left padding": max(difference(logits[r, width - n :], expected[0, :n]) for r, n in enumerate(lengths)),
        "left padding, cache": max(difference(chunked[r, width - n :], expected[0, :n]) for r, n in enumerate(lengths)),
        "right padding": difference(right[0, :3], expected[0, :3]),
        "padded generation": difference(together, torch.stack(alone)),
    }


@torch.no_grad()
def check_batch_sizes(model: Any) -> dict[str, float]:
    """Log-probabilities of 32 texts of several lengths, in batches of 8 and 32 against one by one.

    Padded on the right without a mask, as lm-evaluation-harness does, and on the left with one.
    """
    limit, generator = model.config.context_length, torch.Generator().manual_seed(1)
    texts = [torch.randint(model.config.vocab_size, (2 + 5 * i % (limit - 1),), generator=generator) for i in range(32)]

    def scores(batch_size: int, left: bool) -> Tensor:
        found = []
        for first in range(0, len(texts), batch_size):
            rows = texts[first : first + batch_size]
            width = max(map(len, rows))
            pads = [(width - len(row), 0) if left else (0, width - len(row)) for row in rows]
            batch = torch.stack([F.pad(row, pad) for row, pad in zip(rows, pads, strict=True)])
            mask = torch.stack([F.pad(torch.ones_like(row), pad) for row, pad in zip(rows, pads, strict=True)])
            logits = model(batch, attention_mask=mask if left else None).logits.log_softmax(-1)
            for row, of_row, (start, _) in zip(rows, logits, pads, strict=True):
                found.append(of_row[start : start + len(row) - 1].gather(-1, row[1:, None]).sum() / len(row))
        return torch.stack(found)

    alone = scores(1, left=False)
    return {
        f"{'left' if left else 'right'}, batches of {size}": difference(scores(size, left), alone)
        for left in (False, True)
        for size in (8, 32)
    }


def check_generation(model: Any, ids: Tensor, expected: Tensor) -> dict[str, float]:
    """Greedily, and that beams are the same with and without a cache, whose rows they reorder."""
    prompt = ids[:, :5]
    fixed = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    beams = {**fixed, "num_beams": 3}
    return {
        "greedy": difference(model.generate(prompt, **fixed), expected),
        "greedy, no cache": difference(model.generate(prompt, **fixed, use_cache=False), expected),
        "beams": difference(model.generate(prompt, **beams), model.generate(prompt, **beams, use_cache=False)),
    }


def check_training(model: Any, ids: Tensor, expected: dict[str, Tensor]) -> dict[str, float]:
    """The loss of `labels` and its gradients, with and without gradient checkpointing."""

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(float(loss))
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    losses: list[float] = []
    model.train()
    plain = gradients()
    model.gradient_checkpointing_enable()
    recomputed = gradients()
    model.gradient_checkpointing_disable()
    model.eval()
    return {
        "loss": abs(losses[0] - float(expected["loss"])),
        "gradients": max(difference(plain[name], expected[f"gradient/{name}"]) for name in plain),
        "gradient checkpointing": max(difference(plain[name], recomputed[name]) for name in plain),
    }


class BackendAttention(nn.Module):
    """One layer's attention as an inference server computes it: flat tokens in, flat tokens out, heads by `config`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.size = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        query, key, value = (
            x.view(len(x), heads, self.size).transpose(0, 1)[None]
            for x, heads in ((query, self.heads), (key, self.kv_heads), (value, self.kv_heads))
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return mixed[0].transpose(0, 1).flatten(1)


def backend_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float = 1.0,
    attention_instances: dict[int, nn.Module] | None = None, **settings: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """As vLLM's Transformers backend: one row of tokens, an object for each layer that comes down as a keyword."""
    assert attention_mask is None
    assert attention_instances is not None
    tokens = query.shape[2]
    query, key, value = (x.transpose(1, 2).reshape(tokens, -1) for x in (query, key, value))
    return attention_instances[module.layer_idx](query, key, value, scaling), None  # type: ignore[index]


AttentionInterface.register("backend", backend_attention)


def check_backends(folder: Path, ids: Tensor, expected: Tensor) -> dict[str, float]:
    model = load(folder, attn_implementation="eager")
    eager = model(ids, output_attentions=True, output_hidden_states=True)
    base = load(folder, kind=AutoModel, attn_implementation="backend")
    layers = range(base.config.num_hidden_layers)
    (hidden,) = base(
        input_ids=ids[:1],
        position_ids=torch.arange(ids.shape[1])[None],
        use_cache=False,
        return_dict=False,
        attention_instances={index: BackendAttention(base.config) for index in layers},
    )
    weights = eager.attentions[-1]
    return {
        "eager": difference(eager.logits, expected),
        "backend": difference(model.lm_head(hidden), expected[:1]),
        "attention weights": difference(weights.sum(dim=-1), torch.ones(())),
        "hidden states": difference(model.lm_head(eager.hidden_states[-1]), expected),
        "layers": float(
            len(eager.hidden_states) != len(layers) + 1 or weights.shape[1] != base.config.num_attention_heads
        ),
    }


def check_saving(model: Any, folder: Path, ids: Tensor, expected: Tensor) -> dict[str, float]:
    """Saved in several files and loaded again; loaded in parts onto other devices; in bf16."""
    model.save_pretrained(folder / "saved", max_shard_size="20KB")
    again = load(folder / "saved")
    found = {"saved": difference(again(ids).logits, expected)}
    found["names"] = float({*load_file(folder / "e" / "model.safetensors")} != saved_names(folder / "saved"))
    found["bf16"] = difference(load(folder / "e", torch.bfloat16)(ids).logits.softmax(-1), expected.softmax(-1))
    size = sum(parameter.numel() * 8 for parameter in model.parameters())
    with torch.no_grad():
        spread = load(
            folder / "e", device_map="auto", max_memory={"cpu": size * 9 // 10}, offload_folder=str(folder / "offload")
        )
        found["device map"] = difference(spread(ids).logits, expected)
        found["one device"] = float({*spread.hf_device_map.values()} != {"cpu", "disk"})
    return found


def saved_names(folder: Path) -> set[str]:
    return {*json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]}


def check_tokenizer(folder: Path) -> dict[str, float]:
    expected = json.loads((folder / "tokens.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder / "e", trust_remote_code=True)
    differing = sum(tokenizer(text).input_ids != ids for text, ids in expected["texts"])
    decoded = sum(tokenizer.decode(ids) != text for text, ids in expected["texts"])
    batch = tokenizer(["a", "the river"], return_tensors="pt", padding=True)
    return {
        "ids": float(differing),
        "decoding": float(decoded),
        "end": float(tokenizer.eos_token_id != expected["end"]),
        "padding": float(batch["attention_mask"][:, -1].min() != 1 or batch["attention_mask"][0, 0] != 0),
    }


def check_refusals(folder: Path) -> dict[str, float]:
    """Another architecture, and a format that this file does not know."""
    found = {}
    path = folder / "e" / "config.json"
    before = path.read_text()
    for name, change in (("architecture", {"architecture": "rwkv"}), ("format", {"format_version": 99})):
        path.write_text(json.dumps({**json.loads(before), **change}))
        try:
            load(folder / "e")
        except ValueError as error:
            found[name] = float(not any(str(value) in str(error) for value in change.values()))
        else:
            found[name] = 1.0
    path.write_text(before)
    return found


def check_prompts(model: Any) -> dict[str, float]:
    """Prompts that cannot be read are refused with one message; some are read on."""
    limit, words, end = model.config.context_length, model.config.vocab_size, model.generation_config.eos_token_id
    ids, some, none = torch.full((2, 3), 5), torch.tensor([[1, 1, 1], [0, 0, 1]]), torch.tensor([[1, 1, 1], [0, 0, 0]])
    wrong = {
        "too long": (f"{limit + 1} tokens are more than .*context_length={limit}", torch.full((1, limit + 1), 5), None),
        "empty": (r"input_ids has the shape \(1, 0\).*tokenizer.eos_token_id", ids[:1, :0], ids[:1, :0]),
        "empty row": ("row 1 of attention_mask is padding only", ids, none),
        "flat": (r"input_ids has the shape \(3,\)", ids[0], None),
        "negative": (f"token -1, and the model's vocabulary has the tokens 0 to {words - 1}", ids - 6, None),
        "unknown": (f"token {words}, and the model's vocabulary", ids - 5 + words, None),
    }
    found = {}
    for name, (message, prompt, mask) in wrong.items():
        found[name] = refusal(message, lambda p=prompt, m=mask: model.generate(p, attention_mask=m, max_new_tokens=4))
        if name != "empty row":
            found[f"{name}, forward"] = refusal(message, lambda p=prompt: model(p))
    long = {"max_new_tokens": 2 * limit, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        whole = model.generate(ids, attention_mask=some, **long)  # the first row is without padding
        padded = model.generate(ids[1:], attention_mask=some[1:], **long)  # this one has two more places
        embedded = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **long)
    found["context"] = float((whole.shape[1], padded.shape[1], embedded.shape[1]) != (limit, limit + 2, limit - 3))
    found["context, warning"] = float(sum("context of" in str(warning.message) for warning in warned) != 3)
    greedy = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    found["no prompt"] = difference(model.generate(**greedy), model.generate(torch.tensor([[end]]), **greedy))
    return found


def refusal(message: str, call: Callable[[], Any]) -> float:
    try:
        call()
    except ValueError as error:
        return float(re.search(message, str(error)) is None)
    return 1.0


def main(cases: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    for folder in sorted(path for path in cases.iterdir() if (path / "expected.safetensors").exists()):
        expected = load_file(folder / "expected.safetensors")
        ids, logits = expected["ids"], expected["logits"]
        model = load(folder / "e")
        with torch.no_grad():
            results = check_logits(model, ids, logits)
            results["fp32"] = difference(load(folder / "e", torch.float32)(ids).logits, logits)
            if "greedy" in expected:
                results |= (
                    check_padding(model, ids, logits)
                    | check_batch_sizes(model)
                    | check_backends(folder / "e", ids, logits)
                )
                results |= check_generation(model, ids, expected["greedy"])
        results |= check_training(model, ids, expected)
        if (folder / "tokens.json").exists():
            single = check_batch_sizes(load(folder / "e", torch.float32))
            results |= {f"fp32, {name}": value for name, value in single.items()}
            results |= check_tokenizer(folder) | check_saving(model, folder, ids, logits)
            results |= check_refusals(folder) | check_prompts(model)
        found[folder.name] = results
    assert not any(name.partition(".")[0] in OURS for name in sys.modules)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
