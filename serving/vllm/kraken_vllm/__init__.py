"""A vLLM plugin that serves the exports of kraken-train: Kraken (arXiv 2408.07802) and its baselines.

    configuration.py  config.json, the table of architectures, and what cannot be served
    shares.py         which part of an exported weight a rank holds
    layers.py         what the layers are made of
    kraken.py, gpt.py the layers of each architecture
    decoder.py        from token ids to the input of the head
    backend.py        what all of these need of the program around them
    exchange.py       the sum over sub-layers that is under way during the attention
    model.py          the model as vLLM sees it

All but the last two import no vLLM, and the tests run them on ranks without it. A further architecture is an entry in
`configuration.ARCHITECTURES` and a class in `decoder.LAYERS`.
"""


def register() -> None:
    """Make vLLM know the exports. It calls this in each of its processes, and maybe twice in one."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from kraken_vllm.configuration import KrakenConfig
    from kraken_vllm.settings import KrakenSettings

    AutoConfig.register(KrakenConfig.model_type, KrakenConfig, exist_ok=True)
    MODELS_CONFIG_MAP["KrakenForCausalLM"] = KrakenSettings
    ModelRegistry.register_model("KrakenForCausalLM", "kraken_vllm.model:KrakenForCausalLM")
