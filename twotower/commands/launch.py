"""The launch of every command: its flags, quiet logs, and a user's mistake shown as a line, not as
a traceback.

A command is a module with `FLAGS`, `main` and a docstring. Its flags are in a registry of its own,
so that several commands can be imported into one process. It imports the library in its `main`:
`--help` and a wrong flag need not wait for JAX.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import re
import signal
import sys
import time
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

import twotower
from twotower.core.install import command as command_line
from twotower.runtime import prepare_process

if TYPE_CHECKING:
    from twotower.retrieval.retriever import Retriever

_PACKAGE = str(Path(twotower.__file__).parent)  # loads no module of the package
# Exit statuses, which tell a scheduler what to do; the others are of sysexits.h, in `os`.
FAILED = 1
INTERRUPTED = 130  # as a shell gives it for Ctrl-C
BROKEN_PIPE = 141  # as a shell gives it for SIGPIPE
_GC_THRESHOLDS = (50_000, 20, 50)  # see gc.set_threshold
_HELP = ("--help", "-help", "-h", "--helpshort")


class Command(Protocol):
    """A module of `twotower.commands`.

    Attributes:
        FLAGS: Flags of the command.
        main: The command itself, called when the flags have been parsed.
        __doc__: Usage, the first line of which is a summary.
    """

    FLAGS: flags.FlagValues
    main: Callable[[], None]
    __doc__: str | None


def run(command: Command) -> None:
    """Runs a command under absl with the flags of the command line.

    Mistakes of the user are `ValueError`s and `TrainingError`s of the library that say what to do,
    and refusals of the machine are `OSError`s that name the file; they end the program with their
    message. Anything else is a defect and keeps its traceback. The exit status of a mistake in
    flags or configuration is `os.EX_CONFIG`, that of the loss of another process
    `os.EX_TEMPFAIL`, and that of any other error 1.
    """
    absl_logging.get_absl_handler().addFilter(_is_for_the_user)
    # Importing and tracing make millions of objects, nearly all of which stay: a walk for every 700
    # of them takes a tenth of the time of a short command.
    gc.set_threshold(*_GC_THRESHOLDS)
    atexit.register(_leave_garbage)
    prepare_process()
    # While modules are imported there is nothing to tidy up, and an exception could be swallowed.
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))

    def work() -> None:
        # Imported here: `--help` need not wait for it.
        from twotower.commands.pods.remote_folders import local_copies

        with local_copies(command.FLAGS):
            command.main()

    def main(argv: list[str]) -> None:
        signal.signal(signal.SIGINT, _interrupt)
        call(work, argv)

    app.run(main, flags_parser=lambda argv: parse(command, argv))


def _leave_garbage() -> None:
    """Keeps the interpreter from looking for garbage as it ends.

    It would walk over all objects several times, a seventh of the time of a short command, just
    before the system takes their memory back.
    """
    gc.disable()
    gc.freeze()


class _Interrupts:
    """Whether Ctrl-C was pressed: a library that was just at work may turn the exception into one
    of its own."""

    are_noted = False


def _interrupt(number: int, frame: FrameType | None) -> None:
    _Interrupts.are_noted = True
    signal.default_int_handler(number, frame)


def define_config(flag_values: flags.FlagValues, *, required: bool = True) -> flags.FlagHolder[Any]:
    """Defines --config, the experiment, with --config.OPTION for each option of it.

    Args:
        flag_values: Flags of the command.
        required: Whether it must be given.

    Returns:
        The flag, whose value is the `ConfigDict` with the options of the command line in it.
    """
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "Experiment: the name of a shipped one, or a Python file with get_config(). "
        "--config.OPTION=VALUE replaces an option of it; `twotower options` lists them.",
        flag_values=flag_values,
    )
    flag_values["config"].parser = _ExperimentParser()
    if required:
        flags.mark_flag_as_required("config", flag_values=flag_values)
    return holder


def define_rerank(flag_values: flags.FlagValues) -> flags.FlagHolder[str | None]:
    """Defines --rerank, which `twotower.retrieval.rerank.parse_rerank` reads."""
    return flags.DEFINE_string(
        "rerank",
        None,
        "Re-rank the lists: mmr:diversity=0.5 or caps:column=category,max_items=2; empty for not "
        "at all. By default as config.retrieval.rerank says.",
        flag_values=flag_values,
    )


def load_exported(workdir: Path | str, *, load_towers: bool = True) -> Retriever:
    """Loads the bundle that was exported from a run.

    Args:
        workdir: Folder of the run.
        load_towers: Whether to load the towers too; see `Retriever.load`.

    Raises:
        BundleError: The run has no bundle yet, or one that is not whole.
        ConfigError: The folder is no run.
    """
    # Nothing of training is loaded, which would take longer than to answer.
    from twotower.plugins import load_config
    from twotower.retrieval.bundle import BUNDLE
    from twotower.retrieval.retriever import Retriever

    load_config(workdir)  # says what to do where the folder is no run
    return Retriever.load(Path(workdir) / BUNDLE, load_towers=load_towers)


class _ExperimentParser(flags.ArgumentParser):
    """Reads the experiment that --config names."""

    def parse(self, argument: str) -> Any:
        from twotower.core.errors import ConfigError
        from twotower.experiment import read

        try:
            return read(argument).lock()
        except ConfigError:
            raise
        except (TypeError, ValueError) as error:
            # absl would show it as a wrong flag, without the line of the experiment that is wrong.
            raise RuntimeError(f"--config={argument}: get_config() failed.") from error


def parse(command: Command, argv: list[str]) -> list[str]:
    """Parses the flags; a mistake in them, or --help, ends the program.

    Returns:
        The name of the program, and arguments that are no flags.
    """
    if any(arg in _HELP for arg in argv[1:]):
        print(format_help(command))
        sys.exit(0)
    own = command.FLAGS
    argv = _name_arguments(command, argv)
    argv = [_with_underscores(arg, own) for arg in argv]
    _join_flags_of_absl(own)
    try:
        _check_options(argv)
        rest = own(argv)
    except flags.Error as error:
        _end(f"{_explain_flag(str(error))} (--help lists the flags.)", os.EX_CONFIG)
    except (AttributeError, KeyError) as error:
        # config_flags raises these for a key that a mapping of the experiment does not have.
        message = _explain_missing_key(str(error), argv)
        if message is None:
            raise
        _end(message, os.EX_CONFIG)
    except ValueError as error:
        _refuse(error)
    # absl itself reads the flags of its logging from the registry that all share.
    flags.FLAGS.mark_as_parsed()
    return rest


def call(main: Callable[[], None], argv: list[str]) -> None:
    """Calls `main`; a mistake ends the program with a line.

    Args:
        main: Command, whose flags have been parsed.
        argv: Result of `parse`.
    """
    # Such as a value that a space parts from its flag by mistake: absl would ignore it.
    if argv[1:]:
        _end(
            f"unexpected arguments: {' '.join(argv[1:])}. Options are given as --name=value.",
            os.EX_CONFIG,
        )
    try:
        main()
    except KeyboardInterrupt:
        _leave_interrupted()
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has had enough. Python's own flush at the end of the
        # program must not fail on it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(BROKEN_PIPE)
    except OSError as error:
        # A full disk or a missing file is no defect: its traceback is for --verbosity=1 alone.
        absl_logging.debug("where it happened", exc_info=True)
        _end(_reason(error), FAILED)
    except Exception as error:
        if _Interrupts.are_noted:
            _leave_interrupted()
        _refuse(error)


def call_in_child(main: Callable[[], None], verbosity: int) -> None:
    """Calls the work of a process that a command has started, with a command's logs and errors.

    Args:
        main: Work.
        verbosity: Verbosity of the command's log.
    """
    # absl reads those of its logging from the registry that all share.
    flags.FLAGS.mark_as_parsed()
    absl_logging.use_absl_handler()
    absl_logging.set_verbosity(verbosity)
    absl_logging.get_absl_handler().addFilter(_is_for_the_user)
    gc.set_threshold(*_GC_THRESHOLDS)
    prepare_process()
    # The terminal sends Ctrl-C to all: the command itself says how its children end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    call(main, [""])


def _leave_interrupted() -> typing.NoReturn:
    print(
        "Interrupted. A training goes on from its last checkpoint when the same command is given "
        "again.",
        file=sys.stderr,
    )
    _leave(INTERRUPTED)


def require_one(*alternatives: flags.FlagHolder[Any]) -> None:
    """Refuses a command line that does not give exactly one of some flags.

    Raises:
        ConfigError: None of them is given, or several are.
    """
    from twotower.core.errors import ConfigError

    given = [f"--{flag.name}" for flag in alternatives if flag.value is not None]
    if len(given) == 1:
        return
    names = [f"--{flag.name}" for flag in alternatives]
    problem = "none is given"
    if given:
        problem = f"given: {', '.join(given)}"
    raise ConfigError(f"Give one of {', '.join(names[:-1])} and {names[-1]}; {problem}.")


def format_help(command: Command) -> str:
    """Returns the usage of a command and its flags, with commands as they are given here."""
    usage = re.sub(
        r"^( +)twotower (\w+)",
        lambda found: found[1] + command_line(found[2]),
        command.__doc__ or "",
        flags=re.MULTILINE,
    )
    lines = [usage.strip(), "", "Flags:"]
    for name in sorted(command.FLAGS):
        flag = command.FLAGS[name]
        title = f"  --{name}"
        # Flags without a default are required, or do nothing when they are left out.
        if flag.default not in (None, "", False, []):
            default = str(flag.default_as_str).strip("'")
            title += f" (default: {default})"
        lines.append(title)
        lines.append(flags.text_wrap(flag.help or "", indent="      "))
    return "\n".join(lines)


def _name_arguments(command: Command, argv: list[str]) -> list[str]:
    """Returns the command line with the name of the flag before an argument that has none."""
    name = getattr(command, "POSITIONAL", None)
    if name is None:
        return argv
    flag_of = [arg if arg.startswith("-") else f"--{name}={arg}" for arg in argv[1:]]
    return [argv[0], *flag_of]


def _with_underscores(arg: str, own: flags.FlagValues) -> str:
    """Returns a flag that is written --dry-run as --dry_run, if that is how it is defined."""
    name, equals, value = arg.partition("=")
    underscored = name.lstrip("-").replace("-", "_")
    if not name.startswith("--") or underscored not in own:
        return arg
    return f"--{underscored}{equals}{value}"


def _join_flags_of_absl(own: flags.FlagValues) -> None:
    """Lets a command take the flags of absl's logging too."""
    for name, flag in flags.FLAGS._flags().items():
        if name == flag.name and name not in own:
            own[name] = flag


def _refuse(error: Exception) -> typing.NoReturn:
    """Ends the program with the message of an error of the library; raises any other again."""
    from twotower.core.errors import BusyError, ConfigError, PreemptedError, TwotowerError

    if isinstance(error, ConfigError):
        _end(str(error), os.EX_CONFIG)
    if isinstance(error, (BusyError, PreemptedError)):
        _end(str(error), os.EX_TEMPFAIL)
    if isinstance(error, TwotowerError):
        _end(str(error), FAILED)
    if _is_one_of_several():
        from twotower.training.processes import is_lost_process

        traceback.print_exception(error)
        if is_lost_process(error):
            _end(
                "another process of the run has ended; its log says why. The run goes on from its "
                "last checkpoint when all are started again.",
                os.EX_TEMPFAIL,
            )
        _leave(FAILED)
    # An error of another library is a defect of ours: nothing in it says what to do.
    raise error


def _end(message: str, status: int) -> typing.NoReturn:
    print(f"Error: {message}", file=sys.stderr)
    _leave(status)


def _leave(status: int) -> typing.NoReturn:
    """Ends the program, at once if it is one process of several.

    At a usual end JAX waits for the others, and they may wait for this one.
    """
    if _is_one_of_several():
        _leave_others(status)
    sys.exit(status)


def _leave_others(status: int) -> typing.NoReturn:
    from twotower.training.processes import is_first

    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        # JAX aborts the others as soon as the first one has gone, and they may be about to end with
        # the same message.
        time.sleep(1.0)
    os._exit(status)


def _is_one_of_several() -> bool:
    # Without JAX there are no others, and it takes seconds to import.
    if "jax" not in sys.modules:
        return False
    from twotower.training.processes import is_one_of_several

    return is_one_of_several()


def _is_for_the_user(record: logging.LogRecord) -> bool:
    # JAX and Orbax log dozens of lines about each checkpoint. Orbax warns when a run is only read,
    # and logs the traceback of each error that it then raises.
    lowest = logging.CRITICAL if "orbax" in record.pathname else logging.WARNING
    return record.pathname.startswith(_PACKAGE) or record.levelno >= lowest


def _check_options(argv: list[str]) -> None:
    """Refuses --config.OPTION of an option that there is not, with the nearest that there is."""
    import dataclasses

    from twotower.config import Config
    from twotower.core.errors import ConfigError
    from twotower.experiment import check_option

    for arg in argv[1:]:
        # A boolean may also be given as --noconfig.OPTION.
        option = re.match(r"--?(?:no)?config\.([\w.]+)", arg)
        if option is None:
            continue
        flag = arg.split("=")[0]
        cls: Any = Config
        location = "config"
        for name in option[1].split("."):
            # What lies within a mapping of the user's own is checked with the experiment at hand.
            if not dataclasses.is_dataclass(cls):
                break
            try:
                check_option(name, typing.cast(type, cls), location)
            except ConfigError as error:
                raise ConfigError(f"{flag}: {error}") from None
            location = f"{location}.{name}"
            cls = typing.get_type_hints(cls)[name]


def _explain_missing_key(message: str, argv: list[str]) -> str | None:
    """Returns a message on the key in `argv` that a mapping does not have, if it is one.

    Args:
        message: Text of the exception of config_flags.
        argv: Command line.
    """
    unknown = re.search(r"'(\w+)", message)
    if unknown is None:
        return None
    for arg in argv:
        option = arg.split("=")[0]
        parents, found, _ = option.partition(f".{unknown[1]}")
        if option.startswith("--config.") and found:
            location = parents.removeprefix("--")
            return (
                f"{option}: {location} has no {unknown[1]!r}. A mapping is set whole: "
                f"{parents}={{...}}."
            )
    return None


def _explain_flag(message: str) -> str:
    """Returns a message of absl on a flag, a required one that is missing in plain words."""
    missing = re.search(r"flag --(\w+)=None", message)
    if missing:
        return f"--{missing[1]}=... is required."
    if "Unknown command line flag 'config." in message:
        return "Options such as --config.training.steps=500 need --config=..., whose they are."
    return f"{message.strip().rstrip('.')}."


def _reason(error: OSError) -> str:
    if error.filename:
        reason = (error.strerror or type(error).__name__).rstrip(".")
        return f"{error.filename}: {reason}."
    return str(error).strip()
