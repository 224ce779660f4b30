"""GluonCV's networks: declared under names that do not change, trained by both engines, right with their weights."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from engines.base import Batch
from engines.gluon_engine import GluonEngine
from engines.symbol_engine import SymbolEngine
from errors import ProjectError, UsageError
from gluon import zoo
from graph.shapes import parameter_shapes
from graph.symbol_json import parse
from mxnet_compat import mx
from training.initializer import initial_state

SMALL = "gluoncv:mobilenetv2_0.25"
CLASSES = 4
SIZE = 64


def first_state(graph):
    inputs = {"data": (1, 3, SIZE, SIZE), "softmax_label": (1,)}
    return initial_state(parameter_shapes(parse(graph.tojson()), inputs), seed=1)


def batches(count: int) -> list[Batch]:
    rng = np.random.default_rng(0)
    return [
        Batch(rng.integers(0, 256, (4, 3, SIZE, SIZE), dtype=np.uint8), rng.integers(0, CLASSES, 4), pad=index % 2)
        for index in range(count)
    ]


def test_list_has_classification_networks_only():
    networks = zoo.list_networks()
    for name in ("se_resnext50_32x4d", "mobilenetv2_1.0", "senet_154", "resnet50_v1d", "cifar_resnet20_v1"):
        assert f"gluoncv:{name}" in networks
    assert not [name for name in networks if any(part in name for part in ("ssd", "rcnn", "pose", "kinetics", "int8"))]


@pytest.mark.parametrize(
    "name", ["se_resnext50_32x4d", "senet_154", "resnet50_v1d", "hrnet_w18_small_v1_c", "nasnet_4_1056", "vgg11_bn"]
)
def test_declared_graph_is_the_same_every_time(name):
    first = zoo.declared_graph(name, CLASSES)
    zoo.gluoncv_network("resnet18_v1b", CLASSES)
    assert zoo.declared_graph(f"gluoncv:{name}", CLASSES).tojson() == first.tojson()
    assert first.list_arguments()[-1] == "softmax_label"
    assert first.infer_shape(data=(2, 3, 224, 224))[1] == [(2, CLASSES)]
    decays = {key: attributes.get("__wd_mult__") for key, attributes in first.attr_dict().items()}
    for parameter in first.list_arguments()[1:-1]:
        assert float(decays[parameter]) == float(parameter.endswith(("_weight", "_gamma")))


def test_names_of_resnet50_v1d():
    graph = zoo.declared_graph("resnet50_v1d", CLASSES)
    assert graph.list_arguments()[1] == "resnetv1d_conv0_weight"
    assert graph.list_auxiliary_states()[0] == "resnetv1d_batchnorm0_running_mean"


def test_both_engines_train_it_with_the_same_bits():
    graph = zoo.declared_graph(SMALL, CLASSES)
    engines = [
        SymbolEngine(graph, [mx.cpu()], image_shape=(3, SIZE, SIZE), batch_size=4),
        GluonEngine(zoo.gluoncv_network(SMALL, CLASSES), [mx.cpu()]),
    ]
    states = []
    for engine in engines:
        engine.set_state(first_state(graph))
        for batch in batches(3):
            engine.train_batch(batch, 0.01)
        states.append(engine.get_state())
    first, second = states
    assert list(first.params) == list(second.params)
    assert list(first.optimizer) == list(second.optimizer)
    for name, array in {**first.params, **first.optimizer}.items():
        np.testing.assert_array_equal({**second.params, **second.optimizer}[name], array, err_msg=name)
    assert any((array != first_state(graph).params[name]).any() for name, array in first.params.items())


@pytest.fixture
def published_weights(tmp_path, monkeypatch):
    """Weights where GluonCV looks for those it has downloaded; returns the network that they belong to."""
    zoo.list_networks()  # imports GluonCV as the module does
    from gluoncv.model_zoo import get_model, model_store

    network = get_model("mobilenetv2_0.25", classes=1000)
    network.initialize(mx.init.Xavier())
    network(mx.nd.zeros((1, 3, SIZE, SIZE)))
    folder = tmp_path / "models"
    folder.mkdir()
    network.save_parameters(str(folder / "new.params"))
    digest = hashlib.sha1((folder / "new.params").read_bytes()).hexdigest()
    (folder / "new.params").rename(folder / f"mobilenetv2_0.25-{digest[:8]}.params")
    monkeypatch.setenv("MXNET_HOME", str(tmp_path))
    monkeypatch.setitem(model_store._model_sha1, "mobilenetv2_0.25", digest)
    return network


def test_pretrained_weights_give_their_answers_on_raw_pixels(published_weights):
    raw = np.random.default_rng(0).integers(0, 256, (2, 3, SIZE, SIZE)).astype(np.float32)
    mean, std = (np.array(values, np.float32).reshape((1, 3, 1, 1)) for values in zoo.IMAGENET)
    expected = published_weights(mx.nd.array((raw / 255 - mean) / std)).asnumpy()
    network = zoo.gluoncv_network(SMALL, 1000, pretrained=True)
    np.testing.assert_allclose(network(mx.nd.array(raw)).asnumpy(), expected, rtol=1e-4, atol=1e-5)


def test_classifier_of_other_size_is_left_out(published_weights):
    complete, other = zoo.pretrained_params(SMALL, 1000), zoo.pretrained_params(SMALL, CLASSES)
    assert complete.keys() == first_state(zoo.declared_graph(SMALL, 1000)).params.keys()
    assert complete.keys() - other.keys() == {"arg:mobilenetv20_output_pred_weight"}
    for name, array in other.items():
        np.testing.assert_array_equal(array, complete[name])


def test_weights_that_cannot_be_had(monkeypatch, tmp_path):
    monkeypatch.setenv("MXNET_HOME", str(tmp_path))
    monkeypatch.setenv("MXNET_GLUON_REPO", "http://127.0.0.1:9/")  # nobody answers there
    with pytest.raises(ProjectError, match="cannot get the pretrained weights of mobilenetv2_0.25 .*without --pretr"):
        zoo.gluoncv_network(SMALL, 1000, pretrained=True)
    with pytest.raises(UsageError, match="no pretrained weights for residualattentionnet452"):
        zoo.gluoncv_network("residualattentionnet452", 1000, pretrained=True)


@pytest.mark.parametrize("name", ["gluoncv:se_resnext50", "gluoncv:ssd_300_vgg16_atrous_voc", "gluoncv:"])
def test_unknown_network(name):
    with pytest.raises(UsageError, match="--network list prints all"):
        zoo.declared_graph(name, CLASSES)
