"""A scheduler or server of MXNet's parameter server: `DMLC_ROLE=server python -m engines.kv_server`.

MXNet becomes one when it is imported with that role, and the import only returns in a worker.
"""

from __future__ import annotations

import os
import sys

from errors import ProjectError, UsageError, run_command

ROLES = ("scheduler", "server")


def main() -> int:
    """Serve until the workers are done."""
    if os.environ.get("DMLC_ROLE") not in ROLES:
        raise UsageError("DMLC_ROLE must be scheduler or server; workers run the training command itself")
    try:
        import mxnet_compat  # noqa: F401 - serves, and exits when the workers are done
    except RuntimeError as error:
        # MXNet's own kind of error, whose name cannot be imported when its import fails. Its last line is the cause.
        address = ":".join(os.environ.get(name, "?") for name in ("DMLC_PS_ROOT_URI", "DMLC_PS_ROOT_PORT"))
        cause = str(error).strip().splitlines()[-1]
        raise ProjectError(
            f"the {os.environ['DMLC_ROLE']} cannot serve ({cause}): the scheduler's address is {address}, which must "
            "be this project's scheduler and a free port there"
        ) from None
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
