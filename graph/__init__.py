"""MXNet's formats and graphs without MXNet: symbol JSON, `.params` files, and their execution on PyTorch."""
