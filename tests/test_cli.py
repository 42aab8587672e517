"""What a user types: free text reaches the program as typed, and each mistake is one line and exit code 2."""

from __future__ import annotations

import sys

import pytest
from helpers import REPOSITORY, run_here, run_module, user_error
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from kraken_train.cli import quote_literal, run_entry
from kraken_train.generate import GenerateConfig

PIECES = st.sampled_from(
    ["\\", "'", '"', "$", "{", "}", "${", "${oc.env:HOME}", ",", "(", ")", "[", ":", "=", "#", "@", "~", " ", "\n",
     "\t", "é", "🦑", "null", "true", "1e5", "a"]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, max_size=10).map("".join))
@example("Hello, (world)")
@example("  spaces around  ")
@example('"quoted"')
@example("ends with \\")
@example("\\'${x}\\")
@example("")
def test_free_text_through_hydras_grammar(text: str) -> None:
    if text == "null":
        return
    override = OverridesParser.create().parse_override(quote_literal(f"prompt={text}", frozenset({"prompt"})))
    composed = OmegaConf.create({"prompt": override.value()})
    assert OmegaConf.to_container(composed, resolve=True) == {"prompt": text}


def test_other_arguments_are_left_alone() -> None:
    keys = frozenset({"prompt"})
    for argument in ("seed=1", "prompt=null", "--help", "+extra=a,b", "prompt"):
        assert quote_literal(argument, keys) == argument
    assert quote_literal("prompt=a=b", keys) == "prompt='a=b'"


@pytest.mark.parametrize(
    "text", ["Hello, (world)", " {a: 'b'} \\ ${oc.env:HOME} ", "line one\nline two é🦑", "42", "null'"]
)
def test_free_text_reaches_the_program(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[GenerateConfig] = []
    monkeypatch.setattr(sys, "argv", ["program", "export_dir=a,b (c)", f"prompt={text}"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # set by run_entry; this restores it afterwards
    run_entry(received.append, GenerateConfig, "generate", path_keys=("export_dir",), text_keys=("prompt",))
    assert received[0].prompt == text and received[0].export_dir == "a,b (c)"


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("kraken_train.derive", ["num_sub_layer=4"], "num_sub_layer is not a setting (did you mean num_sub_layers?)"),
        ("kraken_train.derive", ["num_sub_layers=4", "model.num_head=3"], "(did you mean model.num_heads?)"),
        ("kraken_train.derive", ["num_sub_layers=4", "model=gpt2-125m"], "(did you mean gpt2-124m"),
        ("kraken_train.derive", ["num_sub_layers=four"], "num_sub_layers=four: "),
        ("kraken_train.derive", ["num_sub_layers=0"], "num_sub_layers=0 must be greater than 0"),
        ("kraken_train.derive", ["num_sub_layers=4", "tolerance=inf"], "tolerance=inf must be greater than 0 and less"),
        ("kraken_train.derive", ["num_sub_layers=4", "tolerance=2"], "less than 1: it is a fraction"),
        ("kraken_train.derive", ["num_sub_layers=4", "tolerance=nan"], "tolerance=nan must be greater than 0"),
        ("kraken_train.derive", [], "num_sub_layers is not set; give num_sub_layers=VALUE"),
        ("kraken_train.derive", ["num_sub_layers=(4"], "cannot be read as key=value"),
        ("kraken_train.derive", ["num_sub_layers=4", "model=kraken-125m-4way"], "no base to derive from"),
        ("kraken_train.generate", ["export_dir=none", "prompt=a,b"], "export_dir=none is not a folder"),
        (
            "kraken_train.generate",
            ["export_dir=none", "prompt=a", "seed=99999999999999999999999"],
            "seed=99999999999999999999999 must be at least 0 and less than",
        ),
        ("kraken_train.evaluate", ["export_dir=none", "data_dir=none"], "export_dir=none is not a folder"),
        ("kraken_train.evaluate", ["export_dir=e", "data_dir=d", "split=tests"], "split=tests is not known"),
        ("checkpoints.export", ["run_dir=none", "output_dir=e"], "run_dir=none is not a folder"),
        ("checkpoints.export", ["run_dir=none", "output_dir=e", "dtype=int8"], "dtype=int8 is not known"),
        ("kraken_train.report", ["nowhere"], "cannot be read"),
    ],
)
def test_a_mistake_is_one_line(module: str, arguments: list[str], message: str) -> None:
    assert message in user_error(run_here(module, *arguments))


def test_a_mistake_ends_the_process_with_code_2() -> None:
    assert user_error(run_module("kraken_train.derive", "num_sub_layers=0")).endswith("must be greater than 0")


@pytest.mark.parametrize("name", sorted(path.stem for path in (REPOSITORY / "conf").glob("*.yaml")))
def test_entries_write_nothing_by_themselves(name: str) -> None:
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        composed = compose(name, return_hydra_config=True)
    assert composed.hydra.output_subdir is None and composed.hydra.run.dir == "."
    assert composed.hydra.hydra_logging.root is None and composed.hydra.job_logging.root is None
    assert (REPOSITORY / "conf" / f"{name}.yaml").read_text().startswith("# ")
