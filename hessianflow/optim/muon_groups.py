"""Which parameters of a model Muon is for, and which weights a normalisation follows.

Muon is for linear maps between hidden layers. :func:`muon_groups` leaves to the other optimizer of
:class:`~hessianflow.optim.Muon`

- biases, the parameters of normalisation, and every other vector;
- embeddings, and weights that an embedding shares (tied weights), since they are looked up and not
  multiplied;
- the last layer, or layers: those whose output enters no further matrix;
- depthwise convolutions, [channels, 1, height, width]: every channel has a filter of its own, which
  no matrix mixes;
- in a network with convolutions, the linear layers after which neither a convolution nor a
  normalisation comes. They are the classifier on flattened feature maps, and hold most of the
  weights: of a network without normalisation, on 10,000 images of CIFAR-10, a first such layer of
  4096 x 128 under Muon made 56.4 % of 64.7 % (120 updates of 2048 examples), by memorising;
- tensors of other layers that are not named as weights are there (position tables, class tokens),
  or of more than two dimensions outside of convolutions (stacked experts), and weights of a
  parametrization.

Everything else is a matrix: linear layers, convolutions [out, in, height, width] as [out, in *
height * width], the projections of attention (those of query, key and value in one matrix where the
layer holds them in one), and the weights of recurrent layers.

A weight is "normalised" if its scale means nothing, because the output of its layer goes nowhere
but into a normalisation: batch or instance normalisation, or, if the layer has no bias, layer,
group or RMS normalisation. This is read from the graph that `torch.fx` traces on a copy of the
modules. A model that it cannot trace (control flow on data) is taken in the order in which its
modules are registered, and none of its weights is called normalised.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

from hessianflow.interfaces import HessianFlowError
from hessianflow.measuring import generators_kept, unwrap

_CONVOLUTION = nn.modules.conv._ConvNd
_EMBEDDING = (nn.Embedding, nn.EmbeddingBag)
_WITHOUT_MEAN = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
"""Normalisations that take every channel's mean off, and with it a bias before them."""
_OF_SCALE = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_MATRIX = re.compile(r"weight|\w*_proj_weight|weight_(ih|hh|hr)_\w+")
"""Names of the matrices of layers: linear ones, attention, recurrent ones."""
_NORM = re.compile(r"Norm(\dd)?$")
"""End of the names by which classes of other packages say that they normalise."""


@dataclass(frozen=True)
class _Place:
    """A module that is called, where it stands in a model.

    Attributes:
        feeds_matrix: Whether its output enters a further matrix.
        feeds_trunk: Whether its output enters a further convolution or normalisation.
        is_normalised: Whether its output goes into normalisations alone, which undo its scale.
    """

    feeds_matrix: bool
    feeds_trunk: bool
    is_normalised: bool


_Places = dict[nn.Module, _Place]


def muon_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the trainable parameters of a model as groups for :class:`~hessianflow.optim.Muon`.

    Args:
        model: Model, wrapped or not; its modules are not changed.

    Returns:
        Up to three groups {"params": [...], "part": ...}, none of them empty. The parts are
        "normalised" and "unnormalised" matrices, and the "rest". Parameters are in the order of the
        model.

    Raises:
        HessianFlowError: Nothing in the model is for Muon, a layer is lazy, or the model is
            scripted.
    """
    network = unwrap(model)
    if isinstance(network, torch.jit.ScriptModule):
        raise HessianFlowError("a scripted model hides its layers: make the groups before it is")
    if any(map(is_lazy, network.parameters())):
        raise HessianFlowError("the model has lazy layers: run it once on a batch before")
    parts: dict[nn.Parameter, set[str]] = {}
    places = _places(network)
    has_convolutions = any(isinstance(module, _CONVOLUTION) for module in network.modules())
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            part = _part(network, name, parameter, places, has_convolutions)
            parts.setdefault(parameter, set()).add(part)
    groups: dict[str, list[nn.Parameter]] = {"normalised": [], "unnormalised": [], "rest": []}
    for parameter, named in parts.items():
        # A weight that several layers share is what the least of them allows.
        part = next(part for part in ("rest", "unnormalised", "normalised") if part in named)
        groups[part].append(parameter)
    if parts and not groups["normalised"] and not groups["unnormalised"]:
        raise HessianFlowError(
            f"Muon is for matrices and convolutions below the last layer, and the"
            f" {type(network).__name__} has none: train it with SGD or AdamW (--optimizer sgd)"
        )
    return [{"params": held, "part": part} for part, held in groups.items() if held]


def _part(
    network: nn.Module,
    name: str,
    parameter: nn.Parameter,
    places: _Places,
    has_convolutions: bool,
) -> str:
    """Return the part that a parameter belongs to by one of its names."""
    owner, _, local = name.rpartition(".")
    module = network.get_submodule(owner)
    if not _is_matrix(module, local, parameter):
        return "rest"
    place = _place_of(network, owner, places)
    is_last = not place.feeds_matrix
    is_classifier = has_convolutions and isinstance(module, nn.Linear) and not place.feeds_trunk
    if is_last or is_classifier:
        return "rest"
    if place.is_normalised:
        return "normalised"
    return "unnormalised"


def _is_matrix(module: nn.Module, local: str, parameter: nn.Parameter) -> bool:
    if isinstance(module, _CONVOLUTION):
        is_depthwise = module.groups > 1 and module.weight.shape[1] == 1
        return local == "weight" and not is_depthwise and parameter.numel() > 0
    if isinstance(module, _EMBEDDING) or _is_normalisation(module):
        return False
    return parameter.ndim == 2 and parameter.numel() > 0 and _MATRIX.fullmatch(local) is not None


def _place_of(network: nn.Module, owner: str, places: _Places) -> _Place:
    """Return the place of a module, or of the module around it that is called as a whole.

    A module that the model never calls by itself has the place of a hidden layer.
    """
    while network.get_submodule(owner) not in places:
        if not owner:
            return _Place(feeds_matrix=True, feeds_trunk=True, is_normalised=False)
        owner = owner.rpartition(".")[0]
    return places[network.get_submodule(owner)]


def _places(network: nn.Module) -> _Places:
    """Return the places of the modules that a model calls."""
    graph = _traced(network)
    if graph is None:
        return _places_by_order(network)
    feeds_matrix: dict[fx.Node, bool] = {}
    feeds_trunk: dict[fx.Node, bool] = {}
    places: _Places = {}
    for node in reversed(graph.nodes):
        users = {user: _called(network, user) for user in node.users}
        feeds_matrix[node] = any(
            feeds_matrix[user] or _has_matrix(module) for user, module in users.items()
        )
        feeds_trunk[node] = any(
            feeds_trunk[user] or _is_trunk(module) for user, module in users.items()
        )
        module = _called(network, node)
        if module is None:
            continue
        normalised = bool(users) and all(_undoes_scale(module, after) for after in users.values())
        found = _Place(feeds_matrix[node], feeds_trunk[node], normalised)
        # A module that is called several times is in several places.
        earlier = places.get(module, found)
        places[module] = _Place(
            found.feeds_matrix or earlier.feeds_matrix,
            found.feeds_trunk or earlier.feeds_trunk,
            found.is_normalised and earlier.is_normalised,
        )
    return places


def _places_by_order(network: nn.Module) -> _Places:
    """Return the places of modules that are taken to be called one after another."""
    feeds_matrix = False
    feeds_trunk = False
    places: _Places = {}
    for module in reversed(list(_whole_modules(network))):
        places.setdefault(module, _Place(feeds_matrix, feeds_trunk, is_normalised=False))
        feeds_matrix = feeds_matrix or _has_matrix(module)
        feeds_trunk = feeds_trunk or _is_trunk(module)
    return places


def _whole_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that are called as a whole, in the order of registration."""
    if _is_whole(module):
        yield module
        return
    for child in module.children():
        yield from _whole_modules(child)


class _Tracer(fx.Tracer):
    """A tracer that goes into every module that others make up."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        """Return whether a module is one node of the graph."""
        return _is_whole(m)


def _traced(network: nn.Module) -> fx.Graph | None:
    """Return the graph of a model; None if it cannot be traced."""
    if _is_whole(network):
        return None
    # Some models keep what they computed last in an attribute, so a copy is traced. It holds the
    # same parameters, which no forward pass changes.
    shared: dict[int, Any] = {id(parameter): parameter for parameter in network.parameters()}
    try:
        with generators_kept(), torch.no_grad():
            return _Tracer().trace(copy.deepcopy(network, shared))
    except Exception:  # the forward pass of a model may raise anything where it meets no tensor
        return None


def _called(network: nn.Module, node: fx.Node) -> nn.Module | None:
    if node.op != "call_module":
        return None
    return network.get_submodule(str(node.target))


def _is_whole(module: nn.Module) -> bool:
    """Return whether a module is called as a whole: it has no parts, or these belong together."""
    no_parts = not any(True for _ in module.children())
    return no_parts or isinstance(module, nn.MultiheadAttention) or _is_normalisation(module)


def _is_normalisation(module: nn.Module) -> bool:
    """Return whether a module normalises; one made up of normalisations does (a split one)."""
    children = list(module.children())
    if children:
        return all(map(_is_normalisation, children))
    is_named_so = _NORM.search(type(module).__name__) is not None
    return is_named_so or isinstance(module, (*_WITHOUT_MEAN, *_OF_SCALE))


def _has_matrix(module: nn.Module | None) -> bool:
    if module is None:
        return False
    return any(
        _is_matrix(owner, local, parameter)
        for owner in module.modules()
        for local, parameter in owner.named_parameters(recurse=False)
    )


def _is_trunk(module: nn.Module | None) -> bool:
    if module is None:
        return False
    return isinstance(module, _CONVOLUTION) or _is_normalisation(module)


def _undoes_scale(module: nn.Module, after: nn.Module | None) -> bool:
    """Return whether a module after another makes the scale of the other's weights mean nothing.

    A normalisation whose scale and shift are frozen may have frozen statistics, too.
    """
    if after is None or not isinstance(module, (_CONVOLUTION, nn.Linear)):
        return False
    parts = [part for part in after.modules() if not any(True for _ in part.children())]
    kinds: tuple[type[nn.Module], ...] = _WITHOUT_MEAN
    if module.bias is None:
        kinds = (*_WITHOUT_MEAN, *_OF_SCALE)
    is_trained = all(parameter.requires_grad for parameter in after.parameters())
    return is_trained and all(isinstance(part, kinds) for part in parts)
