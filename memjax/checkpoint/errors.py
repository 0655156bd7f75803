"""Errors of checkpoints, which name the folder, step and item, and a way out."""

import contextlib
import errno
import re
from collections.abc import Callable, Iterator

import jax

from memjax.errors import CheckpointError

_DAMAGE = re.compile(r"(DATA_LOSS|INVALID_ARGUMENT|NOT_FOUND|OUT_OF_RANGE|FAILED_PRECONDITION)\b")
"""JAX status codes caused by the data that was read; others are caused by devices or a lack of memory."""

_WRITE_ADVICE = {
    "ENOSPC": "the disk is full; make room, or let a training keep fewer steps with checkpoint.keep",
    "EDQUOT": "the quota of this disk is used up; make room, or let a training keep fewer steps with checkpoint.keep",
    "EFBIG": "a file may not grow that large here; see `ulimit -f`",
    "EMFILE": "too many files are open at once; raise the limit with `ulimit -n`",
    "ENFILE": "this machine has too many files open at once; end other programs",
    "EROFS": "the file system is read-only; mount it for writing, or name another run.dir",
    "EACCES": "this user may not write there; change the permissions, or name another run.dir",
    "EPERM": "this user may not write there; change the permissions, or name another run.dir",
    "ENOTDIR": "a file is where a folder should be; move it away, or name another run.dir",
    "ENOTEMPTY": "another process writes there, or has left files that cannot be deleted; only one may use a run.dir",
    "EEXIST": "something with that name already exists; move it away, or end the other process that writes there",
    "ENOENT": "the folder was removed while it was in use",
    "EIO": "the disk reports an error; look at it before anything else is written there",
    "ESTALE": "the network disk was lost; mount it again",
}


class Damaged(CheckpointError):
    """The data on disk is not what was saved; an older step may be intact."""


@contextlib.contextmanager
def explained(
    kind: type[CheckpointError],
    what: str,
    *,
    advice: Callable[[BaseException], str] | None = None,
    only: type[Exception] = Exception,
) -> Iterator[None]:
    """Reraises exceptions of the body as errors of this kind, with a message that begins with `what`.

    Errors due to a lack of memory or a failing device are not the step's fault and are raised unchanged, as are
    exceptions of types other than `only`. `advice` returns a way out to add to the message.
    """
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except only as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and not _DAMAGE.match(str(error)):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        way_out = advice(error) if advice else ""
        raise kind(f"{what}{': ' if way_out else ''}{way_out} ({reason})") from error


def write_advice(error: BaseException) -> str:
    """What to do about a write error, by the error number in it or in one of its causes."""
    found: BaseException | None = error
    while found is not None:
        names = [errno.errorcode.get(found.errno or 0, "")] if isinstance(found, OSError) else []
        # TensorStore raises ValueError with the number in its text: "No space left on device [os_error_code='28']".
        numbers = re.findall(r"os_error_code='(\d+)'", str(found))
        names += [errno.errorcode.get(int(number), "") for number in numbers]
        names += ["ENOENT"] * ("Checkpoint directory does not exist" in str(found))  # of Orbax
        if advice := next((_WRITE_ADVICE[name] for name in names if name in _WRITE_ADVICE), None):
            return advice
        found = found.__cause__ or found.__context__
    return ""
