"""What a user types: free text reaches the program as typed, and each mistake is one line and exit code 2."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, get_args, get_type_hints

import pytest
from helpers import REPOSITORY, run_here, run_module, user_error
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from kraken_train.common.cli import compose_command, run_entry
from kraken_train.common.free_text import FilePath, Name, Text, free_text_settings, quote_arguments
from kraken_train.config import TrainConfig
from kraken_train.generate import GenerateConfig
from launch.submit import SubmitConfig

PIECES = st.sampled_from(
    ["\\", "'", '"', "$", "{", "}", "${", "${oc.env:HOME}", ",", "(", ")", "[", ":", "=", "#", "@", "~", " ", "\n",
     "\t", "é", "🦑", "null", "true", "1e5", "a"]
)  # fmt: skip


@dataclasses.dataclass
class Settings:
    prompt: Text
    folder: FilePath | dict[str, Any]
    name: Name | None
    tags: tuple[Name, ...]
    count: int


def through_hydra(*arguments: str) -> dict[str, Any]:
    """What a program with `Settings` makes of its arguments."""
    overrides = OverridesParser.create().parse_overrides(quote_arguments(arguments, Settings))
    composed = OmegaConf.create({override.key_or_group: override.value() for override in overrides})
    return OmegaConf.to_container(composed, resolve=True)  # type: ignore[return-value]


@settings(max_examples=150)
@given(st.lists(PIECES, max_size=10).map("".join))
@example("Hello, (world)")
@example("  spaces around  ")
@example('"quoted"')
@example("ends with \\")
@example("\\'${x}\\")
@example("")
def test_free_text_through_hydras_grammar(text: str) -> None:
    if text != "null":
        assert through_hydra(f"prompt={text}") == {"prompt": text}
        assert through_hydra(f"name=.{text}") == {"name": f".{text}"}
    if "," not in text:
        assert through_hydra(f"tags=[.{text}.,b]") == {"tags": [f".{text}.", "b"]}


def test_other_arguments_are_left_alone() -> None:
    for argument in ("seed=1", "prompt=null", "--help", "+extra=a,b", "prompt", "count=1,2", "folder={a/b: 0.7}"):
        assert quote_arguments([argument], Settings) == [argument]
    assert quote_arguments(["prompt=a=b", "++prompt=a"], Settings) == ["prompt='a=b'", "++prompt='a'"]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("name='see this'", "see this"),
        ('name="a, b"', "a, b"),
        (r"name='it\'s'", "it's"),
        ("name='a' and 'b'", "'a' and 'b'"),
        ("name=42", "42"),
        ("name=null", None),
        ("tags=[]", []),
        ("tags=[a, 'b, c' ,\"d\",70%, 1e5, me@lab#1]", ["a", "b, c", "d", "70%", "1e5", "me@lab#1"]),
        ("folder={a/b: 0.7, c: 1}", {"a/b": 0.7, "c": 1}),
        ("folder={a,b}", "{a,b}"),
    ],
)
def test_what_users_quote_by_themselves(argument: str, value: object) -> None:
    assert list(through_hydra(argument).values()) == [value]


def test_the_text_of_every_command() -> None:
    """A setting that is a string is either free text or one of a few words that Hydra's grammar knows."""
    typed = ["tracking.name=me@lab#1", "tracking.notes=see 70%", "tracking.group=a b, c", "run_dir=a=b,c {x}"]
    config = compose_command([*typed, "data_dir=d,(e)", "tracking.tags=[a#1, b c]"], TrainConfig, "train")
    tracking = config.tracking
    assert (tracking.name, tracking.notes, tracking.group) == ("me@lab#1", "see 70%", "a b, c")
    assert (config.run_dir, config.data_dir, tracking.tags) == ("a=b,c {x}", "d,(e)", ("a#1", "b c"))
    assert strings(TrainConfig) - set(free_text_settings(TrainConfig)) == {
        "precision", "resume", "parallel.reduce_dtype", "tracking.kind", "tracking.mode",
        "health.nonfinite", "health.loss_spike",
    }  # fmt: skip
    assert strings(GenerateConfig) - set(free_text_settings(GenerateConfig)) == {"dtype", "device", "collectives"}
    assert strings(SubmitConfig) - set(free_text_settings(SubmitConfig)) == {
        "mem", "time", "sbatch_options", "setup", "srun_options", "prepare.time", "prepare.mem", "evaluate.time",
        "evaluate.mem",
    }  # fmt: skip


def strings(schema: type, prefix: str = "") -> set[str]:
    """Names of the settings that can be a string, or a list of strings."""
    found: set[str] = set()
    for name, kind in get_type_hints(schema).items():
        if dataclasses.is_dataclass(kind):
            found |= strings(kind, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif str in (kind, *get_args(kind)) and name != "model":
            found.add(prefix + name)
    return found


@pytest.mark.parametrize(
    "text", ["Hello, (world)", " {a: 'b'} \\ ${oc.env:HOME} ", "line one\nline two é🦑", "42", "null'"]
)
def test_free_text_reaches_the_program(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[GenerateConfig] = []
    monkeypatch.setattr(sys, "argv", ["program", "export_dir=a,b (c)", f"prompt={text}"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # set by run_entry; this restores it afterwards
    run_entry(received.append, GenerateConfig, "generate")
    assert received[0].prompt == text
    assert received[0].export_dir == "a,b (c)"


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
    assert composed.hydra.output_subdir is None
    assert composed.hydra.run.dir == "."
    assert composed.hydra.hydra_logging.root is None
    assert composed.hydra.job_logging.root is None
    assert (REPOSITORY / "conf" / f"{name}.yaml").read_text().startswith("# ")
