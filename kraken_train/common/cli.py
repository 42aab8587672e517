"""Entry points of commands.

Hydra composes the configuration, `from_hydra` turns it into frozen dataclasses, and a user's mistake ends with one
message and a non-zero exit code.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.global_hydra import GlobalHydra

from kraken_train.common.errors import ConfigError, KrakenError
from kraken_train.common.free_text import quote_arguments
from kraken_train.common.help import answer_help
from kraken_train.common.locales import use_unicode
from kraken_train.common.memory import memory_errors
from kraken_train.common.settings import (
    COMPOSITION_ERRORS,
    describe_composition_error,
    from_hydra,
    to_plain,
)

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"
USER_ERROR_EXIT_CODE = 2
FAULT_EXIT_CODE = 1  # the same command may succeed next time; also the exit code of a traceback

Config = TypeVar("Config")


def run_entry(
    main: Callable[[Config], object],
    schema: type[Config],
    config_name: str,
) -> None:
    """Compose `conf/<config_name>.yaml` with the command line's overrides and call `main` with a `schema` object.

    Values of settings that `schema` marks as free text reach the program as typed (`kraken_train.common.free_text`).
    """
    use_unicode()
    answer_help(
        sys.argv[1:],
        getattr(sys.modules.get(main.__module__), "__doc__", None),
        schema,
        CONF_DIR / f"{config_name}.yaml",
    )
    if {"-m", "--multirun"} & set(sys.argv[1:]):
        exit_with_message("sweeps (--multirun) are not supported; launch.sweep runs one on this machine, launch.submit "
                          "on a cluster")  # fmt: skip
    sys.argv[1:] = quote_arguments(sys.argv[1:], schema)
    # Hydra would otherwise print a shortened traceback and exit by itself; the message is ours to write.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    def task(composed: Any) -> None:
        try:
            with memory_errors("use a smaller batch or fewer workers, or a machine with more memory"):
                main(from_hydra(composed, schema))
        except KrakenError as error:  # here, since Hydra would add lines of its own
            exit_with_message(str(error), FAULT_EXIT_CODE if error.restart_helps else USER_ERROR_EXIT_CODE)

    try:
        hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)(task)()
    except COMPOSITION_ERRORS as error:
        exit_with_message(describe_composition_error(error, schema))
    except ValueError as error:
        if "Config group override" not in str(error):
            raise
        exit_with_message(f"a group of settings must be given by name: {error}")
    except BrokenPipeError:
        leave_unread()
    except KeyboardInterrupt:
        print("interrupted; the same command continues from what is finished", file=sys.stderr)
        sys.exit(130)


def compose_command(
    arguments: Iterable[str],
    schema: type[Config],
    config_name: str,
) -> Config:
    """What `run_entry` would call `main` with, given these arguments: to check a command that runs elsewhere.

    Raises ConfigError.
    """
    quoted = quote_arguments(arguments, schema)
    for argument in quoted:
        if argument.startswith("-"):
            raise ConfigError(f"{argument} cannot be read as key=value; options of Hydra cannot be used here")
    try:
        with initialized_hydra():
            composed = hydra.compose(config_name, quoted)
    except COMPOSITION_ERRORS as error:
        raise ConfigError(describe_composition_error(error, schema)) from error
    except ValueError as error:
        if "Config group override" not in str(error):
            raise
        raise ConfigError(f"a group of settings must be given by name: {error}") from error
    return from_hydra(composed, schema)


def compose_choice(group: str, name: str) -> dict[str, Any]:
    """The settings of conf/<group>/<name>.yaml, those of its defaults included."""
    with initialized_hydra():
        settings = to_plain(hydra.compose(f"{group}/{name}"))
    for part in group.split("/"):
        settings = settings[part]
    return settings


def initialized_hydra() -> AbstractContextManager[object]:
    """Within another command Hydra is initialized already, with the same folder."""
    if GlobalHydra.instance().is_initialized():
        return nullcontext()
    return hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR))


@contextmanager
def user_errors(place: Path) -> Iterator[None]:
    """A user's mistake within this context ends the program with one message.

    For commands without Hydra. `place` is the path to name in an error of the system that names none.
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
    """Exit silently: the reader of our output has closed it, as `| head` does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def exit_with_message(message: str, code: int = USER_ERROR_EXIT_CODE) -> None:
    """Print `error: message` to standard error, once per machine, and exit."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID")
    if rank and (os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID", "0")) != "0":
        # Local rank 0 prints an error that all ranks have, and the launcher ends this rank meanwhile. An error of this
        # rank alone is printed after the pause.
        time.sleep(3)
        message = f"[rank {rank}] {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    if "RANK" in os.environ:
        # Among other ranks the interpreter's own end can abort in the threads of a process group that is still up.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
