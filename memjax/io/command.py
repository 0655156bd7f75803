"""Exit codes of commands, and error messages without tracebacks. JAX is imported only when needed."""

import contextlib
import os
import pathlib
import re
import select
import sys
from collections.abc import Callable

from memjax.errors import CheckpointError, ConfigError, DataError
from memjax.io.console import discard_output, log_to_console, printable
from memjax.io.ctrl_c import heard


def exit_code(command: Callable[[], int | None], *, interrupted: str = "interrupted") -> int:
    """Runs a command; errors that users can fix are printed without a traceback, and `interrupted` after a Ctrl-C.

    Returns:
        The command's return value (None is 0); 2 for an invalid setting; 3 for unusable data; 4 for an unusable
        checkpoint or any OSError; 130 for a Ctrl-C or SIGTERM that the command does not catch; 141 if the reader of
        standard output is gone, as for programs that SIGPIPE ends.
    """
    log_to_console()
    give_threads_to_simulated_devices()
    with contextlib.suppress(AttributeError, ValueError, OSError):
        # Generated text and file names may contain characters that the terminal's encoding lacks.
        sys.stdout.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    codes = {ConfigError: 2, DataError: 3, CheckpointError: 4}
    try:
        return command() or 0
    except tuple(codes) as error:
        print(printable(str(error), error=True), file=sys.stderr)
        return next(code for kind, code in codes.items() if isinstance(error, kind))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _output_is_gone():
            return 141
        print(printable(explain(error), error=True), file=sys.stderr)
        return 4
    except (AssertionError, RuntimeError):
        if "JAX_PLATFORMS" not in os.environ or not _is_without_device():
            raise
        print(
            f"JAX finds no device for JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: set it to what this machine "
            "has (cpu always works), or unset it",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        heard()
        print(f"\n{interrupted}", file=sys.stderr)
        return 130


def give_threads_to_simulated_devices() -> None:
    """Gives XLA enough threads for the CPU devices it simulates, unless NPROC is set; must run before XLA starts.

    Devices that wait for each other hold one thread each; a pool of no more threads than devices could deadlock.
    """
    flags = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    counts = [int(text) for text in (*flags, os.environ.get("JAX_NUM_CPU_DEVICES", "")) if text.isdecimal()]
    if (simulated := max(counts, default=1)) > 1:
        os.environ.setdefault("NPROC", str(max(4 * simulated, os.cpu_count() or 1)))


def _is_without_device() -> bool:
    """Whether JAX can start none of the platforms named in JAX_PLATFORMS."""
    import jax

    try:
        return not jax.devices()
    except (AssertionError, RuntimeError):  # AssertionError: a plugin is installed, but finds no device
        return True


def explain(error: OSError) -> str:
    """An OSError in one line: `runs/a/evals: Permission denied`."""
    if isinstance(error, FileNotFoundError) and error.filename is None and not _has_current_folder():
        return "the current folder no longer exists; change to another"
    is_of_folder = isinstance(error, FileExistsError | NotADirectoryError) and error.filename2 is None
    if is_of_folder and (file := _file_on_the_way(error.filename)):
        return f"{file} is a file, where a folder is needed; name another"
    named = [str(path) for path in (error.filename, error.filename2) if path is not None]
    return ": ".join([*[" -> ".join(named)] * bool(named), error.strerror or str(error) or type(error).__name__])


def _has_current_folder() -> bool:
    try:
        return bool(os.getcwd())
    except FileNotFoundError:
        return False


def _file_on_the_way(path: object) -> pathlib.Path | None:
    """The first of a path's folders, or the path itself, that is a file."""
    if not isinstance(path, str | os.PathLike):
        return None
    whole = pathlib.Path(path)
    return next((part for part in (*reversed(whole.parents), whole) if part.is_file()), None)


def check_output(path: str, name: str, *, makes_folder: bool = False) -> None:
    """Rejects an unwritable output file before any work is done; with makes_folder, its folder may be missing.

    Raises:
        ConfigError: its folder does not exist or is not writable, or the path is a folder.
    """
    folder = os.path.dirname(path) or "."
    while makes_folder and not os.path.lexists(folder):
        folder = os.path.dirname(folder) or "."
    if os.path.isdir(path):
        problem = "is a folder; name a file"
    elif os.path.exists(folder) and not os.path.isdir(folder):
        problem = f"cannot be written: {folder} is a file, where a folder is needed"
    elif not os.path.isdir(folder):
        problem = f"cannot be written: there is no folder {folder}"
    elif not os.access(path if os.path.exists(path) else folder, os.W_OK):
        problem = "cannot be written: permission denied"
    else:
        return
    raise ConfigError(f"{name}={path} {problem}")


def _output_is_gone() -> bool:
    """Whether standard output has no reader; if so, discards its buffer, which could not be flushed at exit."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if not any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0)):
            return False
    except (OSError, ValueError):
        return False
    discard_output()
    return True
