"""What vLLM's settings must be for an export; checked before its processes start."""

from __future__ import annotations

from typing import Any

from vllm.config import CUDAGraphMode
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from kraken_vllm.configuration import require_servable


class KrakenSettings(VerifyAndUpdateConfig):
    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Raises ValueError. On GPUs a model that hides its sums has CUDA graphs of whole decode steps by default."""
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        require_servable(model.hf_config, parallel.tensor_parallel_size, model.max_model_len)
        if not model.hf_config.hides_sums or parallel.tensor_parallel_size == 1:
            return
        if parallel.use_ubatching:
            raise ValueError(
                f"dual batch overlap (--enable-dbo): with architecture={model.hf_config.architecture} the model "
                "overlaps its all-reduces itself; leave it out"
            )
        compilation = vllm_config.compilation_config
        if compilation.cudagraph_mode is None and current_platform.is_cuda_alike():
            compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        elif compilation.cudagraph_mode is not None and compilation.cudagraph_mode.has_piecewise_cudagraphs():
            # Pieces end at the attention, and no graph may end between the start of an all-reduce and its end.
            raise ValueError(
                f"cudagraph_mode={compilation.cudagraph_mode.name} cuts the model into graphs at the attention, but "
                f"with architecture={model.hf_config.architecture} an all-reduce begins before it and ends behind it; "
                "use FULL_DECODE_ONLY, which is the default, or NONE"
            )
