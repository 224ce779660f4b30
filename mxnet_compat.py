"""The one place where MXNet 1.9.1 is imported: `from mxnet_compat import mx`.

MXNet 1.9.1 still uses `numpy.bool`, which numpy removed in 1.24; the alias is put back before the import.
"""

from __future__ import annotations

import numpy as np

if "bool" not in np.__dict__:
    np.bool = np.bool_

import mxnet as mx  # noqa: E402

__all__ = ["mx"]
