"""From flags to the engine that executes the network."""

from __future__ import annotations

import argparse
import os
import sys

from engines.group import Group
from errors import UsageError
from mxnet_settings import recommended_environment
from networks import Network
from training.heartbeat import in_torch_job, local_processes
from training.options import ASYNC_STORE, DIST_STORES, ZOO_PREFIX, network_flags, torch_flags


def choose_engine(args: argparse.Namespace) -> str | None:
    """Replace `--engine auto` in `args` by the engine to take; returns why it is not MXNet, None if it is.

    UsageError where neither MXNet nor PyTorch can do what is asked.
    """
    if args.engine != "auto":
        return None
    reason = _why_not_mxnet(args)
    if reason is None:
        args.engine = "symbol"
        return None
    problem = _why_not_torch(args)
    if problem is not None:
        raise UsageError(f"{reason}; and {problem}")
    args.engine = "torch"
    return f"engine torch, because {reason}"


def _why_not_mxnet(args: argparse.Namespace) -> str | None:
    if torch_flags(args):
        return f"{torch_flags(args)[0]} needs PyTorch"
    if in_torch_job():
        return "torchrun started this process"
    # Before MXNet is imported: it reads them only then.
    prepare_process(args)
    try:
        from mxnet_compat import gpu_problem
    except ImportError as error:
        return str(error)
    return gpu_problem(args.gpus) if args.gpus else None


def _why_not_torch(args: argparse.Namespace) -> str | None:
    try:
        import torch
    except ImportError:
        return "PyTorch is not installed (pip install -r requirements-torch.txt)"
    if args.gpus and not torch.cuda.is_available():
        return "PyTorch sees no GPU either"
    return None


def prepare_process(args: argparse.Namespace) -> None:
    """Environment variables that must be set before MXNet is imported; what the user has set stays."""
    # MXNet announces every bind on stderr, in the middle of the progress bar.
    os.environ.setdefault("MXNET_SUBGRAPH_VERBOSE", "0")
    # oneDNN's fusion of inference graphs gives wrong results for some (GluonCV's cifar_resnet20_v2: off by a third).
    # "default" fuses nothing unless told what; "NONE" means the same, but is announced at every bind.
    os.environ.setdefault("MXNET_SUBGRAPH_BACKEND", "default")
    for name, value in recommended_environment((args.cpus or 1) * local_processes()).items():
        os.environ.setdefault(name, value)
    if args.memonger:
        os.environ["MXNET_BACKWARD_DO_MIRROR"] = "1"
    if args.kv_store in DIST_STORES:
        # Servers that update keep the optimizer's state to themselves. With dist_sync they only sum gradients, every
        # worker does the same update, and the first one can save everything. dist_async knows no other place.
        os.environ["MXNET_UPDATE_ON_KVSTORE"] = "1" if args.kv_store == ASYNC_STORE else "0"


def start_processes(args: argparse.Namespace, argv: list[str] | None) -> int | None:
    """Where PyTorch has several devices: train in one process for each and return the exit status; else None."""
    devices = len(args.gpus) if args.gpus else args.cpus or 1
    if devices == 1 or in_torch_job() or args.test_io or args.engine in ("symbol", "gluon"):
        return None
    reason = choose_engine(args)
    if args.engine != "torch":
        return None
    if args.batch_size % devices:
        # Said here once, and not by every process.
        raise UsageError(f"--batch-size {args.batch_size} cannot be shared by {devices} processes; make it a multiple")
    from engines.torch_group import check_device
    from engines.torch_launch import run_processes

    for index in args.gpus or ():
        check_device(f"cuda:{index}")
    if reason:
        print(reason, file=sys.stderr)
    given = sys.argv[1:] if argv is None else argv
    return run_processes([*given, "--engine", "torch"], devices, args.max_restarts, args.stall_timeout)


def join_group(args: argparse.Namespace) -> Group:
    """The processes that train together, as torchrun or --kv-store says; this one alone where there are no others."""
    if args.test_io:
        return Group()
    if in_torch_job():
        from engines.torch_group import TorchGroup

        return TorchGroup(_torch_device(args))
    if args.kv_store not in DIST_STORES:
        return Group()
    prepare_process(args)
    reason = choose_engine(args)
    if args.engine == "torch":
        raise UsageError(f"--kv-store {args.kv_store} is MXNet's, which cannot be used here: {reason}")
    from engines.kv_group import KVStoreGroup

    return KVStoreGroup(args.kv_store, key_type=str if args.engine == "symbol" else int)


def make_engine(args: argparse.Namespace, network: Network, group: Group):
    """The engine that --engine names, on the devices that --gpus or --cpus name; its part of `group`'s batches."""
    return _MAKERS[args.engine](args, network, group)


def _symbol_engine(args: argparse.Namespace, network: Network, group: Group):
    from engines.symbol_engine import SymbolEngine
    from mxnet_compat import mx

    symbol = mx.sym.load_json(network.json)
    shapes = {"image_shape": network.image_shape, "batch_size": args.batch_size // group.size}
    return SymbolEngine(symbol, _contexts(args), **shapes, **_mxnet_options(args, group))


def _gluon_engine(args: argparse.Namespace, network: Network, group: Group):
    from engines.gluon_engine import GluonEngine

    if args.network.startswith(ZOO_PREFIX):
        from gluon.zoo import gluoncv_network

        net = gluoncv_network(args.network, network.classes)
    else:
        from gluon import get_network

        net = get_network(args.network, **network_flags(args, network.classes))
    return GluonEngine(net, _contexts(args), **_mxnet_options(args, group))


def _torch_engine(args: argparse.Namespace, network: Network, group: Group):
    from engines.torch_engine import TorchEngine

    return TorchEngine(
        network.json, image_shape=network.image_shape, batch_size=args.batch_size // group.size,
        optimizer=args.optimizer, momentum=args.mom, wd=args.wd, seed=args.seed, device=_torch_device(args),
        dtype=args.dtype, compile=args.compile, tf32=not args.no_tf32, memonger=args.memonger, group=group,
        sync_bn=args.sync_bn, accumulate=args.accumulate,
    )  # fmt: skip


def _torch_device(args: argparse.Namespace) -> str:
    """The one device of this process."""
    return f"cuda:{args.gpus[int(os.environ.get('LOCAL_RANK', '0'))]}" if args.gpus else "cpu"


_MAKERS = {"symbol": _symbol_engine, "gluon": _gluon_engine, "torch": _torch_engine}


def _mxnet_options(args: argparse.Namespace, group: Group) -> dict:
    return {
        "optimizer": args.optimizer, "momentum": args.mom, "wd": args.wd, "seed": args.seed,
        "kv_store": getattr(group, "store", args.kv_store), "group": group,
    }  # fmt: skip


def _contexts(args: argparse.Namespace) -> list:
    """MXNet's contexts of --gpus or --cpus; UsageError for GPUs that MXNet cannot use."""
    from mxnet_compat import gpu_contexts, mx

    return gpu_contexts(args.gpus) if args.gpus else [mx.cpu(index) for index in range(args.cpus or 1)]
