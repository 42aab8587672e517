"""What vLLM's Transformers backend needs of an export's modeling_kraken.py, checked without vLLM (0.32 has it all)."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_configs
from torch import nn

from checkpoints.exports import modeling_kraken
from checkpoints.exports.folder import write_export
from kraken_train.model.registry import build_model

CONFIGS = small_configs()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, modeling_kraken.KrakenForCausalLM]:
    """Of each architecture and recipe, from an export."""
    folder, loaded = tmp_path_factory.mktemp("exports"), {}
    for name, config in CONFIGS.items():
        weights = build_model(config).state_dict()
        write_export(folder / name, config, weights, tokenizer_dir=None, metadata={}, dtype=torch.float32)
        loaded[name] = modeling_kraken.KrakenForCausalLM.from_pretrained(folder / name)
    return loaded


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_calls_the_attention_function_once(
    name: str, models: dict[str, modeling_kraken.KrakenForCausalLM]
) -> None:
    """vLLM finds the attention of a layer by the source of `forward`, as it is here."""
    for layer in models[name].layers:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(layer.attention).forward)))
        looked_up = [
            node.target.id
            for node in ast.walk(tree)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
            if node.value is not None and ast.unparse(node.value).startswith("ALL_ATTENTION_FUNCTIONS.")
        ]
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        assert [call.func.id for call in calls if call.func.id in looked_up] == looked_up  # type: ignore[attr-defined]
        assert len(looked_up) == 1
        assert isinstance(layer.attention.layer_idx, int)
        assert isinstance(layer.attention.scaling, float)


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_of_heads_are_numbers(name: str, models: dict[str, modeling_kraken.KrakenForCausalLM]) -> None:
    """vLLM takes the first of these that the configuration has, None included."""
    config, model = models[name].config, CONFIGS[name]
    numbers = [getattr(config, key) for key in ("num_kv_heads", "num_key_value_heads") if hasattr(config, key)]
    assert set(numbers) == {config.streams * model.kv_heads}
    assert config.num_attention_heads == config.streams * model.heads
    assert config.head_dim == model.head_size


def test_a_norm_per_sub_layer_is_traced_to_its_end() -> None:
    """vLLM replaces a module whose trace ends with an RMSNorm by one that has a single gain."""
    norm = modeling_kraken.StackedNorm(3, "rmsnorm", 8, 1e-5)
    nn.init.normal_(norm.weight)
    traced = torch.fx.symbolic_trace(norm)
    nodes = list(traced.graph.nodes)
    assert [node.op for node in nodes].count("placeholder") == 1
    assert "rms_norm" not in str(nodes[-1].args[0].target)
    for shape in ((3, 2, 5, 8), (3, 2, 5, 4, 8)):
        x = torch.randn(shape)
        of_each = zip(x, norm.weight, strict=True)
        expected = torch.stack([nn.functional.rms_norm(part, (8,), gain, 1e-5) for part, gain in of_each])
        torch.testing.assert_close(norm(x), expected)
        torch.testing.assert_close(traced(x), expected)


def test_layers_do_not_come_with_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's processes get configurations of a class that has no source, and so have the layers that it knows."""
    spec = importlib.util.spec_from_file_location("another_modeling_kraken", Path(modeling_kraken.__file__))
    assert spec is not None
    assert spec.loader is not None
    another = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, another)
    spec.loader.exec_module(another)
    model = modeling_kraken.KrakenForCausalLM(another.KrakenConfig(num_sub_layers=2, hidden_size=16))
    assert {type(layer) for layer in model.layers} == {modeling_kraken.KrakenLayer}


@pytest.mark.parametrize("name", ["kraken", "standard-modern"])
def test_divided_heads_are_refused(
    name: str, models: dict[str, modeling_kraken.KrakenForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    def half_the_heads(module: nn.Module, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> tuple[Any, None]:
        return query.chunk(2, dim=1)[0].transpose(1, 2), None

    model = models[name]
    monkeypatch.setitem(modeling_kraken.ALL_ATTENTION_FUNCTIONS._global_mapping, "half", half_the_heads)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "half")
    with pytest.raises(ValueError, match=r"0.5 times the heads .* tensor parallel size of 1"):
        model(torch.zeros(1, 4, dtype=torch.long))
