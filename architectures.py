"""The networks as tables: units, filters, groups and SE ratio per family and depth, and the options a network takes.

Nothing here depends on a framework: the declared graphs (`symbols`) and the imperative networks (`gluon`) read the
same rows, and a command can check its options before it imports anything heavy.

Sources: depths and filters of the residual networks are those of He et al. (arXiv 1603.05027) and Xie et al.
(arXiv 1611.05431); the Inception blocks those of Szegedy et al. (arXiv 1602.07261) with the stem and the widths of the
SENet.mxnet graphs, whose parameter names these tables reproduce; the SE ratio of 1/16 is that of Hu et al.
(arXiv 1709.01507).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Union

from errors import OptionError

SE_RATIO = 1 / 16
BATCH_NORM_EPS = 2e-5


class DataType(NamedTuple):
    """A kind of data: which stem suits it, the side of its images in pixels, its number of classes if fixed."""

    stem: str
    image_size: int
    num_classes: int | None


DATA_TYPES = {
    "imagenet": DataType("imagenet", 224, 1000),
    "vggface": DataType("imagenet", 224, None),
    "msface": DataType("imagenet", 224, None),
    "cifar10": DataType("cifar", 32, 10),
    "fashion-mnist": DataType("cifar", 28, 10),
    "demo": DataType("cifar", 28, 10),
}


# ---------------------------------------------------------------------------------------------- residual networks


class Residual(NamedTuple):
    """Units per stage; filters of the stem's convolution and then of every stage; bottleneck or basic units."""

    units: tuple[int, ...]
    filters: tuple[int, ...]
    bottleneck: bool


_BASIC_FILTERS = (64, 64, 128, 256, 512)
_BOTTLENECK_FILTERS = (64, 256, 512, 1024, 2048)

IMAGENET_DEPTHS = {
    18: Residual((2, 2, 2, 2), _BASIC_FILTERS, bottleneck=False),
    34: Residual((3, 4, 6, 3), _BASIC_FILTERS, bottleneck=False),
    50: Residual((3, 4, 6, 3), _BOTTLENECK_FILTERS, bottleneck=True),
    101: Residual((3, 4, 23, 3), _BOTTLENECK_FILTERS, bottleneck=True),
    152: Residual((3, 8, 36, 3), _BOTTLENECK_FILTERS, bottleneck=True),
    200: Residual((3, 24, 36, 3), _BOTTLENECK_FILTERS, bottleneck=True),
    269: Residual((3, 30, 48, 8), _BOTTLENECK_FILTERS, bottleneck=True),
}


class CifarRule(NamedTuple):
    """Depths from `first` to `last` whose `depth - 2` is a multiple of `layers` make three stages of equal length."""

    first: int
    last: float
    layers: int
    filters: tuple[int, ...]
    bottleneck: bool


CIFAR_RULES = (
    CifarRule(8, 163, 6, (16, 16, 32, 64), bottleneck=False),
    CifarRule(164, float("inf"), 9, (16, 64, 128, 256), bottleneck=True),
)

# Width of a bottleneck's inner convolutions as a share of the unit's filters.
RESNEXT_WIDTH = 0.5
RESNET_WIDTH = 0.25


def residual_table(depth: int, stem: str) -> Residual:
    """Units and filters of a residual network of `depth` layers; OptionError names the depths that exist."""
    if stem == "imagenet":
        if depth not in IMAGENET_DEPTHS:
            raise OptionError(
                f"depth {depth} does not exist for ImageNet-like data; choose one of {_listed(IMAGENET_DEPTHS)}"
            )
        return IMAGENET_DEPTHS[depth]
    for rule in CIFAR_RULES:
        units, rest = divmod(depth - 2, rule.layers)
        if rule.first <= depth <= rule.last and rest == 0:
            return Residual((units,) * 3, rule.filters, rule.bottleneck)
    raise OptionError(
        f"depth {depth} does not exist for CIFAR-like data; below 164 depth - 2 must be a multiple of 6 "
        "(8, 14, 20, ... 158), from 164 up a multiple of 9 (164, 173, 182, ...)"
    )


# ---------------------------------------------------------------------------------------------- Inception networks
#
# A block is a sequence of rows. Node names are made of the block's name and the row's: a Conv row "a_3_conv_1" of
# the block "in4a_0" is the convolution "in4a_0_a_3_conv_1_conv2d".


class Conv(NamedTuple):
    """Convolution with bias; `same` keeps the size at stride 1; `relu` follows unless a BatchNorm comes later."""

    name: str
    filters: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    same: bool = True
    relu: bool = True

    @property
    def pad(self) -> tuple[int, int]:
        return (self.kernel[0] // 2, self.kernel[1] // 2) if self.same else (0, 0)


class Pool(NamedTuple):
    """A pooling with a 3 x 3 window: `avg` at stride 1 with padding, `max` at stride 2 without."""

    name: str
    kind: str


class Concat(NamedTuple):
    """Branches side by side, joined along the channels; a branch is a sequence of rows."""

    name: str
    branches: tuple


class Fork(NamedTuple):
    """The end of a branch that splits once more; its branches join the enclosing Concat."""

    branches: tuple


class AddInput(NamedTuple):
    """The block's input plus `scale` times what the block computed so far."""

    name: str
    scale: float


class Norm(NamedTuple):
    """BatchNorm and ReLU, numbered 1 under the row's name."""

    name: str


InceptionRow = Union[Conv, Pool, Concat, Fork, AddInput, Norm]


class Stage(NamedTuple):
    """`repeats` equal blocks, each followed by an SE block over `channels` when `se`; a single one is not numbered."""

    name: str
    block: tuple[InceptionRow, ...]
    channels: int
    repeats: int = 1
    se: bool = False

    @property
    def block_names(self) -> list[str]:
        return [self.name] if self.repeats == 1 else [f"{self.name}_{i}" for i in range(self.repeats)]


def _block(letter: str, *branches: tuple) -> tuple[InceptionRow, ...]:
    return Concat(f"{letter}_concat1", branches), Norm(letter)


def _residual_block(letter: str, channels: int, *branches: tuple) -> tuple[InceptionRow, ...]:
    joined, norm = _block(letter, *branches)
    return joined, Conv(f"{letter}_linear_conv", channels, relu=False), AddInput(letter, 0.1), norm


_STEM = Stage(
    "stem_stage",
    (
        Conv("conv", 32, (3, 3), stride=2, same=False),
        Conv("stem_conv", 32, (3, 3), same=False),
        Conv("stem_conv_1", 64, (3, 3)),
        Concat("concat_1", ((Pool("pool1", "max"),), (Conv("stem_1_conv_1", 96, (3, 3), stride=2, same=False),))),
        Concat(
            "concat_2",
            (
                (Conv("stem_1_conv_2", 64), Conv("stem_1_conv_3", 96, (3, 3), same=False)),
                (
                    Conv("stem_2_conv_1", 64),
                    Conv("stem_2_conv_2", 64, (7, 1)),
                    Conv("stem_2_conv_3", 64, (1, 7)),
                    Conv("stem_2_conv_4", 96, (3, 3), same=False),
                ),
            ),
        ),
        Concat(
            "concat_3",
            (
                (Pool("pool2", "max"),),
                (Conv("stem_3_conv_1", 192, (3, 3), stride=2, same=False, relu=False),),
            ),
        ),
        Norm(""),
    ),
    channels=384,
)

_V4_A = _block(
    "a",
    (Pool("pool1", "avg"), Conv("a_1_conv", 96, relu=False)),
    (Conv("a_2_conv", 96, relu=False),),
    (Conv("a_3_conv_1", 64), Conv("a_3_conv_2", 96, (3, 3), relu=False)),
    (Conv("a_4_conv_1", 64), Conv("a_4_conv_2", 96, (3, 3)), Conv("a_4_conv_3", 96, (3, 3), relu=False)),
)
_V4_B = _block(
    "b",
    (Pool("pool1", "avg"), Conv("b_1_conv", 128, relu=False)),
    (Conv("b_2_conv", 384, relu=False),),
    (Conv("b_3_conv_1", 192), Conv("b_3_conv_2", 224, (1, 7)), Conv("b_3_conv_3", 256, (7, 1), relu=False)),
    (
        Conv("b_4_conv_1", 192),
        Conv("b_4_conv_2", 192, (1, 7)),
        Conv("b_4_conv_3", 224, (7, 1)),
        Conv("b_4_conv_4", 224, (1, 7)),
        Conv("b_4_conv_5", 256, (7, 1), relu=False),
    ),
)
_V4_C = _block(
    "c",
    (Pool("pool1", "avg"), Conv("c_1_conv", 256, relu=False)),
    (Conv("c_2_conv", 256, relu=False),),
    (
        Conv("c_3_conv_1", 384),
        Fork(
            (
                (Conv("c_3_conv_1_1", 256, (3, 1), relu=False),),
                (Conv("c_3_conv_1_2", 256, (1, 3), relu=False),),
            )
        ),
    ),
    (
        Conv("c_4_conv_1", 384),
        Conv("c_4_conv_2", 448, (1, 3)),
        Conv("c_4_conv_3", 512, (3, 1)),
        Fork(
            (
                (Conv("c_4_conv_3_1", 256, (3, 1), relu=False),),
                (Conv("c_4_conv_3_2", 256, (1, 3), relu=False),),
            )
        ),
    ),
)
_V4_REDUCTION_B = _block(
    "rb",
    (Pool("pool1", "max"),),
    (Conv("rb_2_conv_1", 192), Conv("rb_2_conv_2", 192, (3, 3), stride=2, same=False, relu=False)),
    (
        Conv("rb_3_conv_1", 256),
        Conv("rb_3_conv_2", 256, (1, 7)),
        Conv("rb_3_conv_3", 320, (7, 1)),
        Conv("rb_3_conv_4", 320, (3, 3), stride=2, same=False, relu=False),
    ),
)

_RESNET_A = _residual_block(
    "a",
    384,
    (Conv("a_1_conv", 32),),
    (Conv("a_2_conv_1", 32), Conv("a_2_conv_2", 32, (3, 3))),
    (Conv("a_3_conv_1", 32), Conv("a_3_conv_2", 48, (3, 3)), Conv("a_3_conv_3", 64, (3, 3))),
)
_RESNET_B = _residual_block(
    "b",
    1152,
    (Conv("b_1_conv", 192),),
    (Conv("b_2_conv_1", 128), Conv("b_2_conv_2", 160, (1, 7)), Conv("b_2_conv_3", 192, (7, 1))),
)
_RESNET_C = _residual_block(
    "c",
    2144,
    (Conv("c_1_conv", 192),),
    (Conv("c_2_conv_1", 192), Conv("c_2_conv_2", 224, (1, 3)), Conv("c_2_conv_3", 256, (3, 1))),
)
_RESNET_REDUCTION_B = _block(
    "rb",
    (Pool("pool1", "max"),),
    (Conv("rb_2_conv_1", 256), Conv("rb_2_conv_2", 384, (3, 3), stride=2, same=False, relu=False)),
    (Conv("rb_3_conv_1", 256), Conv("rb_3_conv_2", 288, (3, 3), stride=2, same=False, relu=False)),
    (
        Conv("rb_4_conv_1", 256),
        Conv("rb_4_conv_2", 288, (3, 3)),
        Conv("rb_4_conv_3", 320, (3, 3), stride=2, same=False, relu=False),
    ),
)


def _reduction_a(k: int, l: int, m: int, n: int) -> tuple[InceptionRow, ...]:  # noqa: E741 - the paper's letters
    """Reduction-A with the widths k, l, m, n of table 1 in arXiv 1602.07261."""
    return _block(
        "ra",
        (Pool("pool1", "max"),),
        (Conv("ra_2_conv", n, (3, 3), stride=2, same=False, relu=False),),
        (
            Conv("ra_3_conv_1", k),
            Conv("ra_3_conv_2", l, (3, 3)),
            Conv("ra_3_conv_3", m, (3, 3), stride=2, same=False, relu=False),
        ),
    )


INCEPTION_V4 = (
    _STEM,
    Stage("in4a", _V4_A, channels=384, repeats=4, se=True),
    Stage("re_a", _reduction_a(192, 224, 256, 384), channels=1024),
    Stage("in7b", _V4_B, channels=1024, repeats=7, se=True),
    Stage("re_b", _V4_REDUCTION_B, channels=1536),
    Stage("in3c", _V4_C, channels=1536, repeats=3, se=True),
)
INCEPTION_RESNET_V2 = (
    _STEM,
    Stage("in5a", _RESNET_A, channels=384, repeats=5, se=True),
    Stage("re3a", _reduction_a(256, 256, 384, 384), channels=1152),
    Stage("in10b", _RESNET_B, channels=1152, repeats=10, se=True),
    Stage("re4b", _RESNET_REDUCTION_B, channels=2144),
    Stage("in5c", _RESNET_C, channels=2144, repeats=5, se=True),
)
# Below this side the last reduction of the Inception networks has no cell left.
INCEPTION_MINIMUM_SIZE = 75


# ---------------------------------------------------------------------------------------------- options of a network


@dataclass(frozen=True)
class NetworkOptions:
    """Options that every network takes; None for `num_classes` or `image_size` means that of the data type.

    drop_out: probability to zero an element before the last layer. bn_mom: momentum of the moving statistics.
    workspace: scratch memory of a convolution in MB, heeded by MXNet on GPUs. se_ratio: width of an SE block's hidden
    layer as a share of its channels. no_se: leave the SE blocks out, the plain twin for comparisons.
    """

    num_classes: int | None = None
    data_type: str = "imagenet"
    image_size: int | None = None
    drop_out: float = 0.0
    bn_mom: float = 0.9
    workspace: int = 512
    se_ratio: float = SE_RATIO
    no_se: bool = False

    @property
    def stem(self) -> str:
        """Which stem the data type gets: "imagenet" (stride 4) or "cifar" (stride 1)."""
        return DATA_TYPES[self.data_type].stem

    @property
    def narrowest(self) -> int:
        """Fewest channels that an SE block of the network sees."""
        raise NotImplementedError

    def se_hidden(self, channels: int) -> int:
        """Hidden units of an SE block over `channels` channels."""
        return int(channels * self.se_ratio)

    def check(self) -> None:
        """Raise OptionError for a value that cannot work; one line that says what to change."""
        _require(self.num_classes >= 1, f"num_classes must be at least 1, not {self.num_classes}")
        _require(self.image_size >= 1, f"image_size must be at least 1, not {self.image_size}")
        _require(0 <= self.drop_out < 1, f"drop_out must be in [0, 1), not {self.drop_out}")
        _require(0 <= self.bn_mom < 1, f"bn_mom must be in [0, 1), not {self.bn_mom}")
        _require(self.workspace >= 1, f"workspace must be at least 1 MB, not {self.workspace}")
        _require(
            0 < self.se_ratio <= 1 and (self.no_se or self.se_hidden(self.narrowest) >= 1),
            f"se_ratio must be in [1/{self.narrowest}, 1] for this network, not {self.se_ratio:g}",
        )


@dataclass(frozen=True)
class SEResNetOptions(NetworkOptions):
    """Options of SE-ResNet: besides the common ones its depth in layers."""

    depth: int = 50

    @property
    def table(self) -> Residual:
        """Units and filters; OptionError when the depth does not exist."""
        return residual_table(self.depth, self.stem)

    @property
    def narrowest(self) -> int:
        return min(self.table.filters[1:])


@dataclass(frozen=True)
class SEResNeXtOptions(SEResNetOptions):
    """Options of SE-ResNeXt: num_group is the cardinality of its bottlenecks; basic units have no groups."""

    num_group: int = 32

    def check(self) -> None:
        super().check()
        _require(self.num_group >= 1, f"num_group must be at least 1, not {self.num_group}")
        if self.table.bottleneck:
            width = int(self.narrowest * RESNEXT_WIDTH)
            _require(
                width % self.num_group == 0,
                f"num_group {self.num_group} does not exist for depth {self.depth}: it must divide the {width} "
                f"channels of the narrowest bottleneck ({_listed(d for d in range(1, width + 1) if width % d == 0)})",
            )


@dataclass(frozen=True)
class InceptionOptions(NetworkOptions):
    """Options of the Inception networks; images of at least 75 pixels, drop_out 0.2 as in the SENet.mxnet graphs."""

    drop_out: float = 0.2

    @property
    def narrowest(self) -> int:
        return 384

    def check(self) -> None:
        super().check()
        _require(
            self.image_size >= INCEPTION_MINIMUM_SIZE,
            f"image_size {self.image_size} is too small for an Inception network (at least {INCEPTION_MINIMUM_SIZE}); "
            "take a larger image_size or another network",
        )


NETWORKS = {
    "se_resnext": SEResNeXtOptions,
    "se_resnet": SEResNetOptions,
    "se_inception_v4": InceptionOptions,
    "se_inception_resnet_v2": InceptionOptions,
}


def option_names(network: str) -> list[str]:
    """Names of the options that `network` takes; OptionError for a network that does not exist."""
    if network not in NETWORKS:
        raise OptionError(f"network {network!r} does not exist; choose one of {_listed(NETWORKS)}")
    return [field.name for field in fields(NETWORKS[network])]


def network_options(network: str, **options: object) -> NetworkOptions:
    """Options of `network`, checked, with those that were left out filled in.

    Raises OptionError (a ValueError) for an unknown network, an option that the network does not have, or a value
    that cannot work.
    """
    names = option_names(network)
    unknown = [name for name in options if name not in names]
    if unknown:
        raise OptionError(f"{network} has no option {_listed(unknown)}; it has {_listed(names)}")
    result = NETWORKS[network](**options)
    if result.data_type not in DATA_TYPES:
        raise OptionError(f"data_type {result.data_type!r} does not exist; choose one of {_listed(DATA_TYPES)}")
    data_type = DATA_TYPES[result.data_type]
    if result.num_classes is None:
        _require(data_type.num_classes is not None, f"data_type {result.data_type} needs num_classes")
        result = replace(result, num_classes=data_type.num_classes)
    if result.image_size is None:
        result = replace(result, image_size=data_type.image_size)
    result.check()
    return result


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise OptionError(message)


def _listed(names: object) -> str:
    return ", ".join(str(name) for name in names)
