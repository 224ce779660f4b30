"""The flags of the training command: grouped, with presets applied before the one parse."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from architectures import NETWORKS, option_names
from command_line import HelpFormatter, Parser
from errors import UsageError
from training.augment_options import add_augment_args
from training.heartbeat import STALL_SECONDS, START_SECONDS, in_torch_job, local_processes

ENGINES = ("auto", "symbol", "gluon", "torch")
DTYPES = ("float32", "bfloat16", "float16")
OPTIMIZERS = ("nag", "sgd", "adam")
ASYNC_STORE = "dist_async"
DIST_STORES = ("dist_sync", "dist_device_sync", ASYNC_STORE)
KV_STORES = ("device", "local", "nccl", *DIST_STORES)
DEFAULT_LR = 0.1
DEFAULT_GROUPS = 32
DEFAULT_BN_MOMENTUM = 0.9
NO_VALIDATION = "none"
ZOO_PREFIX = "gluoncv:"
LIST_NETWORKS = "list"


@dataclass(frozen=True)
class Preset:
    """What `--data-type` decides: defaults of other flags, none of them binding."""

    data_dir: str
    image_size: int
    depth: int
    batch_size: int
    epochs: int
    lr_steps: tuple[int, ...]  # in epochs; none may lie at or after `epochs`
    aug_level: int
    pad: int  # pixels of padding before the random crop
    train_names: tuple[str, ...] = ("train.rec",)
    val_names: tuple[str, ...] = ("val.rec",)


# imagenet: epochs, steps and file names as in the original SENet.mxnet. Its CIFAR-10 run ended at epoch 200 with
# steps at 220, 260 and 280, which never came; ours fall at 1/2 and 3/4, as He et al. 2015 (section 4.2) did.
PRESETS = {
    "imagenet": Preset(
        "data/imagenet", 224, 50, 256, 125, (30, 60, 90, 95, 110, 120), 2, 0,
        ("train.rec", "train_480_q90.rec", "train_256_q90.rec"), ("val.rec", "val_256_q90.rec"),
    ),
    "cifar10": Preset("data/cifar10", 32, 164, 128, 200, (100, 150), 1, 4),
    "fashion-mnist": Preset("data/fashion-mnist", 28, 20, 128, 60, (30, 45), 1, 2),
    "demo": Preset("data/demo", 28, 20, 64, 8, (5, 7), 1, 2),
}  # fmt: skip

# Prefixes of the original's four training scripts, so that its checkpoints are found where it left them.
PREFIX_NAMES = {"se_inception_v4": "se-inceptionv4"}


def epoch_list(text: str) -> tuple[int, ...]:
    """`30,60,90` -> (30, 60, 90); an empty text means no steps."""
    try:
        steps = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of epochs such as 30,60,90") from None
    if any(step < 1 for step in steps) or list(steps) != sorted(set(steps)):
        raise argparse.ArgumentTypeError(f"epochs in {text!r} must be positive and ascending")
    return steps


def device_list(text: str) -> tuple[int, ...]:
    """`0,1,2` -> (0, 1, 2)."""
    try:
        devices = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of device numbers such as 0,1") from None
    if min(devices) < 0 or len(set(devices)) != len(devices):
        raise argparse.ArgumentTypeError(f"device numbers in {text!r} must be different and not negative")
    return devices


def number(kind: type, low: float, high: float = float("inf"), *, open_low: bool = False):
    """An argparse type: a number of `kind` in [low, high] (or (low, high] when `open_low`)."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number ({kind.__name__})") from None
        if not (low < value if open_low else low <= value) or not value <= high:
            bounds = f"{'above' if open_low else 'at least'} {low:g}"
            bounds += "" if high == float("inf") else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be {bounds}")
        return value

    return parse


COUNT = number(int, 1)
NATURAL = number(int, 0)
FRACTION = number(float, 0, 1)
RATE = number(float, 0, open_low=True)


def add_network_args(parser: argparse.ArgumentParser, preset: Preset) -> None:
    group = parser.add_argument_group("network")
    group.add_argument(
        "--network",
        default="se_resnext",
        metavar="NAME",
        help=f"{', '.join(NETWORKS)}, or {ZOO_PREFIX}NAME for a "
        f"network of GluonCV; {LIST_NETWORKS!r} prints all of them",
    )
    group.add_argument(
        "--depth", type=COUNT, default=preset.depth,
        help="layers of SE-ResNeXt and SE-ResNet: 18, 34, 50, 101, 152, 200 or 269 for imagenet; for small images "
        "any depth with (depth-2) %% 9 == 0 from 164 up or (depth-2) %% 6 == 0 below",
    )  # fmt: skip
    group.add_argument(
        "--num-group", type=COUNT, default=DEFAULT_GROUPS, help="groups of SE-ResNeXt's 3x3 convolutions"
    )
    group.add_argument("--no-se", action="store_true", help="the plain twin: the same network without SE blocks")
    group.add_argument(
        "--num-classes", type=COUNT, default=None, help="classes (default: what the training file holds)"
    )
    group.add_argument(
        "--drop-out", type=number(float, 0, 0.99), default=None,
        help="dropout before the classifier (default: 0, and 0.2 for the Inception networks, as in the original)",
    )  # fmt: skip
    group.add_argument(
        "--bn-mom", type=FRACTION, default=DEFAULT_BN_MOMENTUM, help="momentum of BatchNorm's moving statistics"
    )
    group.add_argument("--pretrained", action="store_true", help="start from GluonCV's ImageNet weights of its network")
    group.add_argument(
        "--workspace", type=COUNT, default=512, help="MB that a convolution may use as workspace on a GPU"
    )
    group.add_argument(
        "--memonger", action="store_true",
        help="spend time to save memory: recompute cheap activations in the backward pass (MXNet's mirroring)",
    )  # fmt: skip


def add_data_args(parser: argparse.ArgumentParser, preset: Preset) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-type",
        choices=sorted(PRESETS),
        default="imagenet",
        help="preset of the flags that depend on the data",
    )
    group.add_argument("--data-dir", type=Path, default=Path(preset.data_dir), help="folder of the .rec files")
    group.add_argument(
        "--train-rec", type=Path, default=None,
        help=f"training file (default: the first of {', '.join(preset.train_names)} in --data-dir)",
    )  # fmt: skip
    group.add_argument(
        "--val-rec", type=Path, default=None,
        help=f"validation file (default: the first of {', '.join(preset.val_names)} in --data-dir); "
        f"{NO_VALIDATION!r} trains without",
    )  # fmt: skip
    group.add_argument(
        "--num-examples",
        type=COUNT,
        default=None,
        help="training images, checked against what the file holds",
    )
    group.add_argument("--image-size", type=COUNT, default=preset.image_size, help="height and width in pixels")
    group.add_argument("--batch-size", type=COUNT, default=preset.batch_size, help="images an update, all devices")
    group.add_argument(
        "--data-threads", type=COUNT, default=None, help="decoding threads (default: processors; tiny images: 1)"
    )
    group.add_argument("--skip-bad", action="store_true", help="count and skip images that do not decode")
    group.add_argument("--test-io", action="store_true", help="measure the loader alone, print images/s and stop")
    group.add_argument(
        "--device-speed", type=RATE, default=None, metavar="IMAGES/S",
        help="with --test-io: say how many devices of this speed the loader can feed",
    )  # fmt: skip


def add_training_args(parser: argparse.ArgumentParser, preset: Preset) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=COUNT, default=preset.epochs, help="epochs in all")
    group.add_argument(
        "--lr", type=RATE, default=None,
        help=f"learning rate (default: {DEFAULT_LR}; when training is continued, the schedule's own rate, "
        "and a given one holds from there on)",
    )  # fmt: skip
    group.add_argument(
        "--lr-steps",
        type=epoch_list,
        default=preset.lr_steps,
        metavar="EPOCH,...",
        help="epochs where the rate falls",
    )
    group.add_argument("--lr-factor", type=FRACTION, default=0.1, help="what the rate is multiplied by at a step")
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="nag", help="the update rule")
    group.add_argument("--mom", type=number(float, 0, 0.9999), default=0.9, help="momentum of nag and sgd")
    group.add_argument("--wd", type=number(float, 0), default=1e-4, help="weight decay of weights and gammas")
    group.add_argument("--seed", type=NATURAL, default=0, help="decides initial weights, order and augmentation")


def add_checkpoint_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("checkpoints")
    group.add_argument(
        "--model-prefix", default=None, help="where checkpoints go (default: model/NETWORK-DATA_TYPE-DEPTH-0)"
    )
    group.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint, if any")
    group.add_argument(
        "--model-load-epoch", type=NATURAL, default=0, metavar="N",
        help="load epoch N; with --retrain continue from there, without start a fresh schedule (finetune)",
    )  # fmt: skip
    group.add_argument("--retrain", action="store_true", help="continue from --model-load-epoch with optimizer state")
    group.add_argument(
        "--model-load-prefix", default=None, help="prefix of the checkpoint to load (default: --model-prefix)"
    )
    group.add_argument("--overwrite", action="store_true", help="start afresh where checkpoints of another run lie")
    group.add_argument(
        "--save-every",
        type=NATURAL,
        default=0,
        metavar="UPDATES",
        help="save inside an epoch too; 0: at its end only",
    )
    group.add_argument(
        "--keep",
        type=NATURAL,
        default=0,
        metavar="K",
        help="keep the K newest epochs and the best one; 0: keep all",
    )


def add_device_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("devices")
    group.add_argument(
        "--engine", choices=ENGINES, default="auto",
        help="who executes the graph: MXNet's Module (symbol), MXNet's Gluon, or PyTorch; auto: symbol where MXNet can "
        "do what is asked, else torch",
    )  # fmt: skip
    group.add_argument("--gpus", type=device_list, default=None, metavar="0,1,...", help="GPUs (default: the CPU)")
    group.add_argument("--cpus", type=COUNT, default=None, metavar="N", help="N CPU contexts")
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of PyTorch's arithmetic")
    group.add_argument("--compile", action="store_true", help="let torch.compile generate the kernels")
    group.add_argument(
        "--sync-bn", action="store_true", help="BatchNorm statistics of all devices together, not of each (PyTorch)"
    )
    group.add_argument(
        "--accumulate", type=COUNT, default=1, metavar="K",
        help="cut a batch into K micro-batches whose gradients are summed, for batches that memory cannot hold "
        "(PyTorch)",
    )  # fmt: skip
    group.add_argument(
        "--max-restarts", type=NATURAL, default=0, metavar="N",
        help="start several processes again from the newest checkpoint when one died, so many times (PyTorch; "
        "python -m training.launch has its own)",
    )  # fmt: skip
    group.add_argument(
        "--stall-timeout", type=number(float, 1), default=STALL_SECONDS, metavar="SECONDS",
        help="of several processes one that finishes no batch for so long counts as dead; one that starts has "
        f"{START_SECONDS:g} s (PyTorch; python -m training.launch has its own)",
    )  # fmt: skip
    group.add_argument("--no-tf32", action="store_true", help="full float32 products on GPUs that have TF32 (PyTorch)")
    group.add_argument(
        "--kv-store", choices=KV_STORES, default="device",
        help="how MXNet sums the gradients of devices; dist_*: of the workers that python -m training.launch starts",
    )  # fmt: skip


def add_log_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("log")
    group.add_argument(
        "--log-dir", type=Path, default=None, help="folder of run.jsonl and train.log (default: log/RUN)"
    )
    group.add_argument("--frequent", type=COUNT, default=50, metavar="BATCHES", help="batches between two log lines")


def build_parser(data_type: str = "imagenet") -> argparse.ArgumentParser:
    """The parser with the defaults of the preset `data_type`."""
    preset = PRESETS[data_type]
    parser = Parser(
        prog="train_se_resnext.py",
        description="Train a Squeeze-and-Excitation network from RecordIO files. Defaults follow --data-type; "
        f"those shown are for {data_type}.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add_network_args(parser, preset)
    add_data_args(parser, preset)
    add_augment_args(parser.add_argument_group("augmentation"))
    add_training_args(parser, preset)
    add_checkpoint_args(parser)
    add_device_args(parser)
    add_log_args(parser)
    parser.set_defaults(aug_level=preset.aug_level, pad=preset.pad)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse and check the flags; wrong ones end the process with status 2 (argparse) or raise UsageError."""
    chooser = Parser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--data-type", choices=sorted(PRESETS), default="imagenet")
    data_type = chooser.parse_known_args(argv)[0].data_type
    args = build_parser(data_type).parse_args(argv)
    if args.network == LIST_NETWORKS:
        return args
    check_args(args, PRESETS[data_type])
    return complete_args(args, PRESETS[data_type])


def check_args(args: argparse.Namespace, preset: Preset) -> None:
    """Refuse combinations that cannot work, each in one line that says what to change."""
    if args.network not in NETWORKS and not args.network.startswith(ZOO_PREFIX):
        raise UsageError(
            f"--network {args.network} does not exist; there are {', '.join(NETWORKS)} and {ZOO_PREFIX}NAME, "
            f"--network {LIST_NETWORKS} prints all"
        )
    if args.device_speed is not None and not args.test_io:
        raise UsageError("--device-speed only says what --test-io compares with; add --test-io")
    for flag in torch_flags(args):
        if args.engine in ("symbol", "gluon"):
            raise UsageError(f"{flag} needs PyTorch: take --engine torch, or leave it out")
    if args.gpus is not None and args.cpus is not None:
        raise UsageError("--gpus and --cpus exclude each other; leave one out")
    if args.model_load_prefix is not None and not args.model_load_epoch:
        raise UsageError("--model-load-prefix says where --model-load-epoch N is; add it, N from 1")
    if args.retrain and not args.model_load_epoch:
        raise UsageError("--retrain needs --model-load-epoch N; to continue from the newest checkpoint use --resume")
    if args.resume and args.model_load_epoch:
        raise UsageError("--resume finds the newest checkpoint itself; leave out --model-load-epoch, or use --retrain")
    check_network_flags(args, preset)
    check_devices(args)
    late = [step for step in args.lr_steps if step >= args.epochs]
    if late and args.lr_steps != preset.lr_steps:
        raise UsageError(
            f"--lr-steps {late[0]} never comes: training ends after epoch {args.epochs}; raise --epochs or leave it out"
        )
    args.lr_steps = tuple(step for step in args.lr_steps if step < args.epochs)


def torch_flags(args: argparse.Namespace) -> list[str]:
    """The flags that were given and that PyTorch alone can follow."""
    given = {
        "--dtype": args.dtype != "float32", "--compile": args.compile, "--no-tf32": args.no_tf32,
        "--sync-bn": args.sync_bn, "--accumulate": args.accumulate > 1, "--max-restarts": args.max_restarts > 0,
        "--stall-timeout": args.stall_timeout != STALL_SECONDS,
    }  # fmt: skip
    return [flag for flag, value in given.items() if value]


def check_network_flags(args: argparse.Namespace, preset: Preset) -> None:
    """Refuse flags of another network than the one that is asked for."""
    given = {
        "depth": args.depth != preset.depth, "num_group": args.num_group != DEFAULT_GROUPS, "no_se": args.no_se,
        "drop_out": args.drop_out is not None, "bn_mom": args.bn_mom != DEFAULT_BN_MOMENTUM,
    }  # fmt: skip
    has = network_option_names(args.network)
    for name in (name for name, changed in given.items() if changed and name not in has):
        raise UsageError(f"--network {args.network} has no --{name.replace('_', '-')}; leave it out")
    if args.pretrained and not args.network.startswith(ZOO_PREFIX):
        raise UsageError(f"--pretrained is for networks of GluonCV, not for {args.network}; leave it out")


def check_devices(args: argparse.Namespace) -> None:
    """Refuse what --kv-store or the launcher of this process cannot do."""
    store, devices = args.kv_store, len(args.gpus) if args.gpus else args.cpus or 1
    if args.batch_size < devices:
        raise UsageError(f"--batch-size {args.batch_size} is smaller than the number of devices ({devices}); raise it")
    if args.batch_size < devices * args.accumulate:
        raise UsageError(
            f"--batch-size {args.batch_size} is smaller than devices times micro-batches "
            f"({devices} x {args.accumulate}); raise it, or lower --accumulate"
        )
    if in_torch_job() and not args.test_io:
        check_torch_job(args)
    if store == "nccl" and not args.gpus:
        raise UsageError("--kv-store nccl sums gradients of GPUs; name them with --gpus, or take --kv-store device")
    if args.test_io:
        return
    if store not in DIST_STORES:
        if os.environ.get("DMLC_ROLE") == "worker":
            raise UsageError(
                f"this is a worker of a parameter server (DMLC_ROLE=worker), --kv-store {store} would train in every "
                f"one of them alone: add --kv-store {DIST_STORES[0]}"
            )
        return
    if args.engine == "torch":
        raise UsageError(
            f"--kv-store {store} is MXNet's; --engine torch spreads over machines with torchrun, leave the flag out"
        )
    if os.environ.get("DMLC_ROLE") != "worker":
        raise UsageError(
            f"--kv-store {store} is for workers of a parameter server (DMLC_ROLE=worker): "
            "start them with python -m training.launch -n WORKERS -s SERVERS -- python train_se_resnext.py ..."
        )
    if store == ASYNC_STORE and args.engine == "gluon":
        raise UsageError(f"--kv-store {store} needs --engine symbol: Gluon's trainer cannot change the servers' rate")


def check_torch_job(args: argparse.Namespace) -> None:
    """Refuse what cannot work in a process that torchrun started."""
    if args.engine not in ("auto", "torch") or args.kv_store in DIST_STORES:
        raise UsageError("torchrun starts processes for --engine torch; MXNet's start with python -m training.launch")
    local = local_processes()
    given = len(args.gpus) if args.gpus else args.cpus or local
    if given != local:
        raise UsageError(f"{given} devices for {local} processes on this machine; make --nproc-per-node {given}")


def complete_args(args: argparse.Namespace, preset: Preset) -> argparse.Namespace:
    """Fill in what other flags decide: prefix, log folder and data files."""
    if args.model_prefix is None:
        args.model_prefix = f"model/{run_name(args)}-0"
    if args.model_load_prefix is None:
        args.model_load_prefix = args.model_prefix
    finetune = args.model_load_epoch and not args.retrain
    if finetune and args.model_load_prefix == args.model_prefix:
        # A fresh schedule counts epochs from 1 again; the run it starts from must not be overwritten.
        args.model_prefix += "-finetuned"
    if args.log_dir is None:
        args.log_dir = Path("log") / Path(args.model_prefix).name
    args.train_rec = args.train_rec or first_existing(args.data_dir, preset.train_names)
    if str(args.val_rec) == NO_VALIDATION:
        args.val_rec = None
    else:
        args.val_rec = args.val_rec or first_existing(args.data_dir, preset.val_names)
    return args


def network_option_names(network: str) -> list[str]:
    """Options that a network takes besides its number of classes; those of GluonCV's are fixed by their names."""
    return [] if network.startswith(ZOO_PREFIX) else option_names(network)


def network_flags(args: argparse.Namespace, classes: int) -> dict:
    """Options of the network that --network names, for `symbols.get_symbol`."""
    given = {
        "num_classes": classes, "depth": args.depth, "num_group": args.num_group, "data_type": args.data_type,
        "image_size": args.image_size, "drop_out": args.drop_out, "bn_mom": args.bn_mom,
        "workspace": args.workspace, "no_se": args.no_se,
    }  # fmt: skip
    return {
        name: value for name, value in given.items() if name in network_option_names(args.network) and value is not None
    }


def run_name(args: argparse.Namespace) -> str:
    """`se-resnext-imagenet-50`: network, data and depth as the original named its checkpoints."""
    name = PREFIX_NAMES.get(args.network, args.network.replace("_", "-").replace(":", "-"))
    if args.no_se:
        name = name.replace("se-", "", 1)
    depth = args.depth if "depth" in network_option_names(args.network) else 0
    return f"{name}-{args.data_type}-{depth}"


def first_existing(folder: Path, names: tuple[str, ...]) -> Path:
    """The first of `names` that lies in `folder`; the first name when none does."""
    return next((folder / name for name in names if (folder / name).exists()), folder / names[0])
