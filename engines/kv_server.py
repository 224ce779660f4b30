"""A scheduler or server of MXNet's parameter server: `DMLC_ROLE=server python -m engines.kv_server`.

MXNet becomes one when it is imported with that role, and the import only returns in a worker.
"""

from __future__ import annotations

import os
import sys

from errors import UsageError, run_command

ROLES = ("scheduler", "server")


def main() -> int:
    """Serve until the workers are done."""
    if os.environ.get("DMLC_ROLE") not in ROLES:
        raise UsageError("DMLC_ROLE must be scheduler or server; workers run the training command itself")
    import mxnet_compat  # noqa: F401 - serves, and exits when the workers are done

    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
