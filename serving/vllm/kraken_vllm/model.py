"""The model as vLLM sees it: the decoder, compiled, and the head, whose vocabulary the ranks share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, ReplicatedLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

import kraken_vllm.exchange  # noqa: F401 (registers its operators)
from kraken_vllm.configuration import require_servable
from kraken_vllm.decoder import Decoder
from kraken_vllm.shares import Share

HEAD = "lm_head.weight"
VOCABULARY_STEP = 64  # rows of the head are padded to a multiple of this and of the ranks


class VllmBackend:
    """`Backend` in one of vLLM's processes."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        self.share = Share(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
        self.cache_config = vllm_config.cache_config
        self.quant_config = vllm_config.quant_config
        self.is_quantized = self.quant_config is not None
        self.all_reduce = tensor_model_parallel_all_reduce
        self.start_sum = torch.ops.vllm.kraken_start_sum
        self.add_sum = torch.ops.vllm.kraken_add_sum

    def attention(self, heads: int, kv_heads: int, head_dim: int, scale: float, prefix: str) -> nn.Module:
        attention: nn.Module = Attention(
            heads,
            head_dim,
            scale,
            num_kv_heads=kv_heads,
            cache_config=self.cache_config,
            quant_config=self.quant_config,
            prefix=prefix,
        )
        return attention

    def linear(self, in_features: int, out_features: int, prefix: str) -> Any:
        return ReplicatedLinear(
            in_features, out_features, bias=False, quant_config=self.quant_config, prefix=prefix, return_bias=False
        )


def require_quantized(model: nn.Module, quantization: str) -> None:
    """Raises ValueError unless the method quantizes linear maps, and that while it loads them."""
    maps = [module for module in model.modules() if isinstance(module, LinearBase)]
    if not all(hasattr(one, "weight") for one in maps):
        reason = "reads weights that were quantized before, and an export has none"
    elif all(isinstance(one.quant_method, UnquantizedLinearMethod) for one in maps):
        reason = "leaves all linear maps of this model as they are"
    else:
        return
    raise ValueError(f"--quantization {quantization} {reason}; use fp8_per_tensor or fp8_per_channel")


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "inputs_embeds": 0})
class KrakenModel(Decoder):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config.model_config.hf_config, VllmBackend(vllm_config), prefix)


class KrakenForCausalLM(nn.Module):
    """Of all architectures. Raises ValueError for what cannot be served, see `require_servable`."""

    suppressed: Tensor

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        size = get_tensor_model_parallel_world_size()
        require_servable(config, size)
        quantization = vllm_config.model_config.quantization
        at = f"{prefix}." if prefix else ""
        self.model = KrakenModel(vllm_config=vllm_config, prefix=f"{at}model")
        if quantization is not None:
            require_quantized(self.model, quantization)
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.embedding_width,
            padding_size=math.lcm(VOCABULARY_STEP, size),
            prefix=f"{at}lm_head",
        )
        self.logits_processor = LogitsProcessor(config.vocab_size)
        # Rows of the head that are no tokens, which transformers' `generate` suppresses too.
        rows = vllm_config.model_config.try_get_generation_config().get("suppress_tokens") or []
        self.register_buffer("suppressed", torch.tensor(rows, dtype=torch.long), persistent=False)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        embedding: Tensor = self.model.token_embedding(input_ids)
        return embedding

    def forward(self, input_ids: Tensor | None, positions: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        hidden: Tensor = self.model(input_ids, positions, *args, **kwargs)
        return hidden

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        if logits is not None and len(self.suppressed):
            logits.index_fill_(-1, self.suppressed, -torch.inf)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Returns the names of the parameters, of which vLLM reports those that are missing. Raises ValueError."""
        source = "token_embedding.weight" if self.config.tie_embeddings else HEAD

        def without_head() -> Iterator[tuple[str, Tensor]]:
            for name, full in weights:
                if name == source:
                    self.lm_head.weight_loader(self.lm_head.weight, full)
                if name != HEAD:
                    yield name, full

        self.model.load(without_head())
        return {name for name, _ in self.named_parameters()}
