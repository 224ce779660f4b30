"""GluonCV's classification networks, declared for this project's trainer: `gluoncv:NAME`.

They expect images normalised with the mean and standard deviation of ImageNet's pixels (of CIFAR's for `cifar_*`), as
GluonCV's training scripts do it, while every graph here takes raw 0-255 pixels. So the normalisation is put in front
of the network, as arithmetic with constants: it has no parameters, is the same in training and inference, and
pretrained weights give the answers that they give in GluonCV.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from engines.base import IGNORED_LABEL
from errors import ProjectError, UsageError
from mxnet_compat import mx

from mxnet.gluon import HybridBlock  # isort: skip

PREFIX = "gluoncv:"

# Modules of gluoncv.model_zoo whose networks classify single images...
MODULES = (
    "alexnet", "cifarresnet", "cifarresnext", "cifarwideresnet", "densenet", "dla", "googlenet", "hrnet", "inception",
    "mobilenet", "mobilenetv3", "nasnet", "residual_attentionnet", "resnest", "resnet", "resnetv1b", "resnext", "senet",
    "shufflenet", "squeezenet", "vgg", "xception", "yolo.darknet",
)  # fmt: skip
# ...but for those that end so: segmentation heads of HRNet, and group normalisation that MXNet 1.9.1 cannot trace.
EXCLUDED_ENDINGS = ("_s", "_gn")
# Arguments that a family needs besides the common ones. NASNet's second classifier would be a second output.
FAMILY_ARGUMENTS = {"nasnet": {"use_aux": False}}
# Characters of another library's error message that are repeated to the user.
MESSAGE_LENGTH = 120


class Normalisation(NamedTuple):
    """Mean and standard deviation of the channels red, green and blue, as fractions of the full scale."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = Normalisation((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


class RawPixels(HybridBlock):
    """A network behind the normalisation of raw 0-255 pixels: images (N, 3, H, W) -> logits (N, classes)."""

    def __init__(self, network: HybridBlock, normalisation: Normalisation):
        super().__init__(prefix="")
        self.network = network
        self.normalisation = normalisation

    def hybrid_forward(self, F, x):
        channels = F.SliceChannel(x, num_outputs=3, axis=1, name="normalise_split")
        scaled = []
        for index, (mean, std) in enumerate(zip(*self.normalisation)):
            centred = F._internal._minus_scalar(channels[index], scalar=255 * mean, name=f"normalise_mean{index}")
            scaled.append(F._internal._div_scalar(centred, scalar=255 * std, name=f"normalise_std{index}"))
        return self.network(F.Concat(*scaled, dim=1, name="normalise"))


def list_networks() -> list[str]:
    """`gluoncv:NAME` of every network that classifies images."""
    return [
        PREFIX + name
        for name, make in sorted(_model_zoo()._models.items())
        if _family(make) in MODULES and not name.endswith(EXCLUDED_ENDINGS)
    ]


def gluoncv_network(name: str, classes: int, pretrained: bool = False) -> HybridBlock:
    """A network of GluonCV's zoo for raw 0-255 images (N, 3, H, W), giving logits (N, classes).

    name: with or without the prefix "gluoncv:". Names of parameters depend on `name` alone. Weight decay acts on
    weights and gammas only, as everywhere in this project. pretrained: with ImageNet weights (CIFAR-10's for
    `cifar_*`), the classifier too when it has as many classes; else parameters are not initialised.
    Raises UsageError for an unknown name, ProjectError when GluonCV or the weights cannot be had.
    """
    net = _declare(name, classes)
    if pretrained:
        _load_pretrained(net, name, classes)
    return net


def declared_graph(name: str, classes: int) -> mx.sym.Symbol:
    """The network as a symbol for any engine: `data` (N, 3, H, W), raw 0-255, and `softmax_label` to "softmax"."""
    net = _declare(name, classes)
    with mx.name.NameManager():
        logits = net(mx.sym.var("data"))
    return mx.sym.SoftmaxOutput(logits, name="softmax", use_ignore=True, ignore_label=IGNORED_LABEL)


def pretrained_params(name: str, classes: int) -> dict[str, np.ndarray]:
    """ "arg:NAME" and "aux:NAME" -> array of GluonCV's pretrained weights that fit a network with `classes` classes.

    The classifier is missing when it was trained for another number of classes. Raises ProjectError when there are
    no weights, or GluonCV cannot get them.
    """
    graph = declared_graph(name, classes)
    kinds = dict.fromkeys(graph.list_auxiliary_states(), "aux")
    parameters = gluoncv_network(name, classes, pretrained=True).collect_params()
    return {
        f"{kinds.get(key, 'arg')}:{key}": parameter.data().asnumpy()
        for key, parameter in parameters.items()
        if parameter._data is not None
    }


def _declare(name: str, classes: int) -> HybridBlock:
    make, family = _find(name)
    arguments = {"pretrained": False, **FAMILY_ARGUMENTS.get(family, {})}
    arguments["num_classes" if family == "hrnet" else "classes"] = classes
    # Gluon numbers the blocks of a process; a manager of its own makes every network the first of its kind.
    with mx.name.NameManager():
        net = make(**arguments)
    for parameter in net.collect_params().values():
        if not parameter.name.endswith(("_weight", "_gamma")):
            parameter.wd_mult = 0.0
    return RawPixels(net, CIFAR if _plain(name).startswith("cifar_") else IMAGENET)


def _load_pretrained(net: RawPixels, name: str, classes: int) -> None:
    """Fill `net` with the weights of GluonCV's own network wherever the shapes agree."""
    make, family = _find(name)
    plain = _plain(name)
    from gluoncv.model_zoo import pretrained_model_list

    if plain not in pretrained_model_list():
        raise UsageError(f"GluonCV has no pretrained weights for {plain}; train it from scratch, without --pretrained")
    try:
        with mx.name.NameManager():
            source = make(pretrained=True, **FAMILY_ARGUMENTS.get(family, {})).collect_params()
    except Exception as error:  # whatever the download stumbles over: each layer below raises errors of its own
        raise ProjectError(
            f"GluonCV cannot get the pretrained weights of {plain} ({_first_line(error)}): connect to the network, or "
            "put the file where GluonCV looks for it (~/.mxnet/models), or train without --pretrained"
        ) from error
    for key, parameter in net.collect_params().items():
        array = source[key].data()
        if all(own in (0, other) for own, other in zip(parameter.shape, array.shape)):
            parameter.shape = array.shape
            parameter.initialize("zeros")
            parameter.set_data(array)


def _find(name: str):
    """The function that makes the network, and its family; UsageError for a name that does not exist."""
    known = list_networks()
    if PREFIX + _plain(name) not in known:
        close = difflib.get_close_matches(PREFIX + _plain(name), known, n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise UsageError(f"GluonCV has no classification network {_plain(name)}; {hint}--network list prints all")
    make = _model_zoo()._models[_plain(name)]
    return make, _family(make)


def _plain(name: str) -> str:
    return name[len(PREFIX) :] if name.startswith(PREFIX) else name


def _family(make) -> str:
    return make.__module__.partition("model_zoo.")[2]


def _first_line(error: Exception) -> str:
    line = (str(error) or type(error).__name__).splitlines()[0]
    return line if len(line) <= MESSAGE_LENGTH else f"{line[:MESSAGE_LENGTH]}..."


def _model_zoo():
    """GluonCV's module of networks by name; ProjectError when GluonCV cannot be imported."""
    try:
        # GluonCV refuses to be imported where a PyTorch of 2.0 or later is installed; its MXNet part needs none.
        with _hidden("torch"):
            from gluoncv.model_zoo import model_zoo
    except ImportError as error:
        raise ProjectError(
            f"GluonCV cannot be imported ({_first_line(error)}): pip install -r requirements.txt"
        ) from error
    return model_zoo


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Make `import module` fail for a while."""
    loaded = sys.modules.get(module)
    sys.modules[module] = None
    try:
        yield
    finally:
        if loaded is None:
            del sys.modules[module]
        else:
            sys.modules[module] = loaded
