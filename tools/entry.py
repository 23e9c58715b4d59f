"""How a command ends: its exit code, and the message a person reads when it fails."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence

from ir.errors import NomulError, ResourceError

INTERRUPTED = 130
_CLOSED_PIPE = 141


def run(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run a command's main and return its exit code; an expected failure prints its message and no traceback.

    Codes: 0 ok, 2 usage, 3 unsupported, 4 quality gate, 5 resources, 130 interrupted; errors nobody expected are
    raised, so that Python shows the traceback and exits with 1.
    """
    try:
        return main(argv)
    except NomulError as error:
        return _fail(error)
    except KeyboardInterrupt:
        print("interrupted; a compilation goes on with the same command and --resume", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone (`| head`); without this the interpreter would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _CLOSED_PIPE
    except MemoryError as error:
        return _fail(ResourceError("memory does not suffice", why=str(error), fix="lower --samples or --seqlen"))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return _fail(ResourceError("the disk is full", where=str(error.filename or ""), fix="free some space"))


def _fail(error: NomulError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code
