"""Text that continues a prompt: python -m kraken_train.generate export_dir=EXPORT prompt="Once upon a time"

Shapes: B prompts of T tokens each, V vocabulary size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoints.export_folder import read_export
from kraken_train.cli import run_entry
from kraken_train.errors import CheckpointError, ConfigError
from kraken_train.inference.device import DEVICES, choose_device
from kraken_train.inference.kv_cache import make_caches
from kraken_train.inference.sampling import Sampling, draw
from kraken_train.model import LanguageModel
from kraken_train.rules import require_choice, require_positive


@dataclass(frozen=True)
class GenerateConfig:
    """See conf/generate.yaml."""

    export_dir: str
    prompt: str
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int
    use_cache: bool
    device: str  # auto | cpu | cuda

    def validate(self) -> None:
        """Raises ConfigError."""
        require_positive("max_new_tokens", self.max_new_tokens)
        require_choice("device", self.device, DEVICES)
        if not self.prompt:
            raise ConfigError("prompt is empty; give prompt=TEXT")
        if any("\ud800" <= character <= "\udfff" for character in self.prompt):
            raise ConfigError("prompt is not valid UTF-8")
        self.sampling.validate()

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed)


@torch.inference_mode()
def generate(
    model: LanguageModel,
    input_ids: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    *,
    end_of_document: int | None = None,
    vocab_size: int | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continues prompts (B, T) by up to `max_new_tokens`: token ids (B, T + new), on the CPU.

    A row that has reached `end_of_document` is filled with it; when all rows have, generation stops. `vocab_size` is
    the tokenizer's, where the embedding has further rows as padding: those are never drawn. Raises ConfigError if
    prompt and new tokens exceed the context, CheckpointError if the model computes no finite numbers.
    """
    batch_size, prompt_tokens = input_ids.shape
    require_room(prompt_tokens, max_new_tokens, model.context_length)
    caches = make_caches(model, batch_size, prompt_tokens + max_new_tokens) if use_cache else None
    device = model.token_embedding.weight.device
    generator = sampling.generator()
    ids = input_ids.cpu()
    finished = torch.zeros(batch_size, dtype=torch.bool)
    seen = 0  # tokens in the caches
    for _ in range(max_new_tokens):
        positions = torch.arange(seen, ids.shape[1], device=device)
        logits = model(ids[:, seen:].to(device), caches, positions)
        if not logits[:, -1].isfinite().all():
            raise CheckpointError("the model's predictions are not finite: its weights are damaged or have diverged")
        next_ids = draw(logits[:, -1, :vocab_size], sampling, generator)
        seen = ids.shape[1] if use_cache else 0
        if end_of_document is not None:
            next_ids = next_ids.masked_fill(finished, end_of_document)
            finished |= next_ids == end_of_document
        ids = torch.cat([ids, next_ids[:, None]], dim=1)
        if finished.all():
            break
    return ids


def require_room(prompt_tokens: int, max_new_tokens: int, context_length: int) -> None:
    """Raises ConfigError unless prompt and new tokens together fit into the context."""
    if prompt_tokens == 0:
        raise ConfigError("prompt has no tokens; give prompt=TEXT")
    possible = context_length - prompt_tokens
    if possible < 1:
        raise ConfigError(
            f"prompt has {prompt_tokens} tokens, which leaves no room in the model's context of {context_length}; "
            f"use at most {context_length - 1}"
        )
    if max_new_tokens > possible:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens} after a prompt of {prompt_tokens} tokens exceeds the model's context of "
            f"{context_length}; use at most {possible}"
        )


def main(config: GenerateConfig) -> None:
    """Print the prompt and its continuation."""
    device = choose_device(config.device)
    export = read_export(Path(config.export_dir))
    tokenizer = export.load_tokenizer()
    prompt = list(tokenizer.encode_batch([config.prompt])[0])
    require_room(len(prompt), config.max_new_tokens, export.config.context_length)
    ids = generate(
        export.load_model(torch.float32, device),  # in bf16 logits tie, and ties fall differently with a cache
        torch.tensor([prompt]),
        config.max_new_tokens,
        config.sampling,
        end_of_document=tokenizer.end_of_document,
        vocab_size=tokenizer.vocab_size,
        use_cache=config.use_cache,
    )
    text = [i for i in ids[0].tolist() if i != tokenizer.end_of_document]
    print(tokenizer.decode(text))


if __name__ == "__main__":
    run_entry(main, GenerateConfig, "generate", path_keys=("export_dir",), text_keys=("prompt",))
