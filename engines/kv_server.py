"""A scheduler or server of MXNet's parameter server: `DMLC_ROLE=server python -m engines.kv_server`.

MXNet becomes one when it is imported with that role, and the import only returns in a worker.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from errors import ProjectError, UsageError, run_command
from training.launch_processes import SIGNAL_EXIT_BASE

ROLES = ("scheduler", "server")
# SLURM and Kubernetes send SIGTERM to all processes of a job, and SIGKILL 30 s later. Meanwhile the workers need the
# servers to finish their batch, to save and to end.
GRACE_SECONDS = 25


def main() -> int:
    """Serve until the workers are done; after SIGTERM for GRACE_SECONDS at most."""
    if os.environ.get("DMLC_ROLE") not in ROLES:
        raise UsageError("DMLC_ROLE must be scheduler or server; workers run the training command itself")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_in_time, daemon=True).start()
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


def _end_in_time() -> None:
    number = signal.sigwait({signal.SIGTERM})
    time.sleep(GRACE_SECONDS)
    os._exit(SIGNAL_EXIT_BASE + number)


if __name__ == "__main__":
    sys.exit(run_command(main))
