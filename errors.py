"""The two kinds of mistakes that end a command with one line instead of a traceback."""

from __future__ import annotations

import logging
import sys
from typing import Callable

from install_hints import explain_import_error


class ProjectError(Exception):
    """Something failed that the user can act on; the message is one line: the cause and the way out."""

    exit_status = 1


class SaidElsewhere(ProjectError):
    """Another process of the same run failed, says why, and ends with `exit_status`; this one ends quietly."""

    def __init__(self, exit_status: int):
        super().__init__("another process of the run failed; its own message says why")
        self.exit_status = exit_status


class UsageError(ProjectError):
    """Wrong usage or wrong input, found before any work was done; exit status 2 as argparse uses."""

    exit_status = 2


class OptionError(UsageError, ValueError):
    """An option, or its value, that does not exist; also a ValueError, for callers that are not commands."""


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command's main function; a ProjectError or a missing package becomes one line on stderr.

    Returns the exit status: what `main` returned (None counts as 0), 1 or 2 for errors, 130 after Ctrl-C.
    """
    # Warnings of the rooms (a rebuilt index, a directory made again) in the same form as errors.
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        return main() or 0
    except SaidElsewhere as error:
        return exit_status_of(error)
    except ProjectError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_status_of(error)
    except ImportError as error:
        hint = explain_import_error(error)
        if hint is None:
            raise
        print(f"error: {hint}", file=sys.stderr)
        return ProjectError.exit_status
    except KeyboardInterrupt as error:
        print("interrupted", file=sys.stderr)
        return exit_status_of(error)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing is left to tell, and nobody to tell it to.
        sys.stderr.close()
        return 1


def exit_status_of(error: BaseException) -> int:
    """The status with which `run_command` ends a command that `error` stopped; 1 where Python prints a traceback."""
    return 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_status", 1)
