"""The edge between the command line and the program.

Hydra composes the configuration, `from_hydra` turns it into frozen dataclasses, and whatever goes wrong because
of what the user typed or gave us ends as one message and a non-zero exit code.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.global_hydra import GlobalHydra

from kraken_train.config import setting_names
from kraken_train.errors import ConfigError, KrakenError
from kraken_train.locales import use_unicode
from kraken_train.parsing import COMPOSITION_ERRORS, describe_composition_error, escape_interpolations, from_hydra

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"
USER_ERROR_EXIT_CODE = 2
FAULT_EXIT_CODE = 1  # where the same command may succeed next time, as after any error that is not told in one line

Config = TypeVar("Config")


def run_entry(
    main: Callable[[Config], None],
    schema: type[Config],
    config_name: str,
    path_keys: Iterable[str] = (),
    text_keys: Iterable[str] = (),
) -> None:
    """Compose `conf/<config_name>.yaml` with the command line's overrides and call `main` with a `schema` object.

    The values of `path_keys` and `text_keys` reach the program as typed, although Hydra's grammar would read a comma
    as a sweep and a parenthesis as a function; of a path, `~` is expanded. Where a path may be `{FOLDER: WEIGHT, ...}`,
    that is left to Hydra.
    """
    use_unicode()
    if {"-m", "--multirun"} & set(sys.argv[1:]):
        exit_with_message("sweeps (--multirun) are not supported: start the command once per value, each with its own "
                          "folder")  # fmt: skip
    sys.argv[1:] = quote_arguments(sys.argv[1:], path_keys, text_keys)
    # Hydra would otherwise print a shortened traceback and exit by itself; the message is ours to write.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    def task(composed: Any) -> None:
        try:
            main(from_hydra(composed, schema))
        except KrakenError as error:  # here, since Hydra would add lines of its own
            exit_with_message(str(error), FAULT_EXIT_CODE if error.restart_helps else USER_ERROR_EXIT_CODE)

    try:
        hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)(task)()
    except COMPOSITION_ERRORS as error:
        exit_with_message(describe_composition_error(error, setting_names(schema)))
    except ValueError as error:
        if "Config group override" not in str(error):
            raise
        exit_with_message(f"a group of settings must be given by name: {error}")
    except BrokenPipeError:
        leave_unread()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is finished", file=sys.stderr)
        sys.exit(130)


def compose_command(
    arguments: Iterable[str],
    schema: type[Config],
    config_name: str,
    path_keys: Iterable[str] = (),
    text_keys: Iterable[str] = (),
) -> Config:
    """What `run_entry` would call `main` with, given these arguments: to check a command that runs elsewhere.

    Raises ConfigError.
    """
    quoted = quote_arguments(arguments, path_keys, text_keys)
    for argument in quoted:
        if argument.startswith("-"):
            raise ConfigError(f"{argument} cannot be read as key=value; options of Hydra cannot be used here")
    # Within another command Hydra is there already, and knows the same folder.
    ready = GlobalHydra.instance().is_initialized()
    try:
        with nullcontext() if ready else hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
            composed = hydra.compose(config_name, quoted)
    except COMPOSITION_ERRORS as error:
        raise ConfigError(describe_composition_error(error, setting_names(schema))) from error
    except ValueError as error:
        if "Config group override" not in str(error):
            raise
        raise ConfigError(f"a group of settings must be given by name: {error}") from error
    return from_hydra(composed, schema)


@contextmanager
def user_errors(place: Path) -> Iterator[None]:
    """What goes wrong in this context because of what the user gave us ends the program with one message.

    For commands without Hydra. `place` is what an error of the system is about where it does not say so itself.
    """
    use_unicode()
    try:
        yield
        sys.stdout.flush()
    except KrakenError as error:
        exit_with_message(str(error))
    except BrokenPipeError:
        leave_unread()
    except OSError as error:
        exit_with_message(f"{error.filename2 or error.filename or place} cannot be read or written: {error.strerror}")


def leave_unread() -> None:
    """Exit in silence: whoever read our output has left, as `| head` does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def quote_arguments(arguments: Iterable[str], path_keys: Iterable[str], text_keys: Iterable[str]) -> list[str]:
    """Arguments as Hydra's grammar needs them, so that the values of these keys mean what was typed."""
    paths, literal = frozenset(path_keys), frozenset([*path_keys, *text_keys])
    return [
        argument if is_mapping(argument, paths) else quote_literal(expand_home(argument, paths), literal)
        for argument in arguments
    ]


def expand_home(argument: str, path_keys: frozenset[str]) -> str:
    """`run_dir=~/run` -> `run_dir=/home/me/run`: not every shell does it after `=`."""
    key, separator, value = argument.partition("=")
    if key.lstrip("+") not in path_keys or not value.startswith("~"):
        return argument
    return key + separator + os.path.expanduser(value)


def is_mapping(argument: str, path_keys: frozenset[str]) -> bool:
    """Whether it is `data_dir={data/web: 0.7, data/books: 0.3}`."""
    key, _, value = argument.partition("=")
    return key.lstrip("+") in path_keys and re.fullmatch(r"\{.*:.*\}", value) is not None


def quote_literal(argument: str, literal_keys: frozenset[str]) -> str:
    """`prompt=Hello, world` -> `prompt='Hello, world'` for a key in `literal_keys`; other arguments unchanged.

    The value means what was typed, its own quotes included; only `null` keeps its meaning.
    """
    key, separator, value = argument.partition("=")
    if not separator or key.lstrip("+") not in literal_keys or value == "null":
        return argument
    # In Hydra's quoted strings backslashes are special only before a quote and at the end.
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", escape_interpolations(value))
    escaped = re.sub(r"(\\+)\Z", r"\1\1", escaped)
    return f"{key}='{escaped}'"


def exit_with_message(message: str, code: int = USER_ERROR_EXIT_CODE) -> None:
    """Print `error: message` to standard error, once per machine, and exit."""
    if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) != "0":
        # A mistake that every rank sees is told by local rank 0, and the launcher ends this one meanwhile. What
        # this rank alone has seen is still told.
        time.sleep(3)
        message = f"[rank {os.environ.get('RANK', os.environ.get('SLURM_PROCID'))}] {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    if "RANK" in os.environ:
        # Among other ranks the interpreter's own end can abort in the threads of a process group that is still up.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
