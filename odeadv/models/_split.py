"""Split an existing network into stem, blocks and head, by the names of its layers."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from odeadv.models._blocks import PACK, BlockNetwork
from odeadv.models._network import TargetLoss
from odeadv.support.checks import did_you_mean


def from_module(net: nn.Module, layers: Sequence[str], *, loss: TargetLoss | None = None) -> BlockNetwork:
    """Return ``net`` as a field with the layers of these names as blocks; see `from_blocks`.

    The operations before the first layer are the stem, and the operations after the last layer are the head.
    Operations between two layers are a block too. `torch.fx` traces the forward passes of the modules that contain a
    layer. The layers and all other modules are called without tracing. Modules are shared with ``net``, so training
    the field trains ``net``. The names in ``net.state_dict()`` do not change.

    Args:
        net: the network. Its first argument is the input. The other arguments keep their defaults.
        layers: names as in ``net.named_modules()``, such as ``"layer1.0"``, in any order. Only a single tensor, the
            state, may pass from layer to layer.
        loss: ``loss(output, targets)``, see `from_blocks`.

    Raises:
        TypeError, ValueError: if ``net`` cannot be traced or split. The message names the layer.

    Example:
        >>> net = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
        >>> wrapped = odeadv.models.from_module(net, ["1", "2"])
        >>> field = wrapped.field(torch.rand(3, 4), torch.tensor([0, 1, 2]), eta=0.1)
        >>> odeadv.solve(field, scheme="strang").output.shape
        torch.Size([3, 4])
    """
    names = _read_names(net, layers)
    modes = {part: part.training for part in net.modules()}
    versions = []
    try:
        # The trace of F.dropout(x, training=self.training) contains the current mode, so both modes are traced.
        for training in (True, False):
            for part in modes:
                part.training = training
            versions.append(_cut(*_trace(net, names), names))
    finally:
        for part, training in modes.items():
            part.training = training
    trained, evaluated = versions
    if len(trained) != len(evaluated):
        raise ValueError("net: got a forward pass with other blocks in training mode, expected the same in both modes")
    stem, *blocks, head = (_joined(net, a, b) for a, b in zip(trained, evaluated, strict=True))
    made = BlockNetwork(stem, blocks, head, loss=loss, names=[part.title for part in trained[1:-1]])
    made.training = net.training
    return made


def _read_names(net: nn.Module, layers: Any) -> list[str]:
    """Return the names after a check that they are layers of ``net``, and that layers do not contain other layers."""
    if not isinstance(net, nn.Module):
        raise TypeError(f"net: got {type(net).__name__}, expected a torch.nn.Module")
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(f"layers: got {type(layers).__name__}, expected a sequence of names such as ['layer1.0']")
    names = list(layers)
    known = [name for name, _ in net.named_modules() if name]
    if not names:
        raise ValueError("layers: got none, expected at least one name of net.named_modules()")
    for name in names:
        if name not in known:
            raise ValueError(f"layers: got {name!r}, expected names of net.named_modules(){did_you_mean(name, known)}")
        if names.count(name) > 1:
            raise ValueError(f"layers: got {name!r} twice, expected each name once")
        for outer in names:
            if name.startswith(f"{outer}."):
                raise ValueError(f"layers: got {name!r}, which lies in {outer!r}, expected one of the two")
    return names


class _LayerTracer(fx.Tracer):
    """Traces the forward passes of modules that contain a layer. All other modules stay single calls."""

    def __init__(self, layers: Sequence[str]) -> None:
        super().__init__()
        self.inside: list[tuple[str, nn.Module]] = []  # the nested modules that are being traced
        self.called: set[str] = set()  # names of the modules that have been called, unlike those of a ModuleList
        self._layers = layers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Return True if ``m`` does not contain a layer."""
        return not any(layer.startswith(f"{module_qualified_name}.") for layer in self._layers)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Record the call. If it fails, ``inside`` keeps the module for the message."""
        self.inside.append((self.path_of_module(m), m))
        self.called.add(self.inside[-1][0])
        result = super().call_module(m, forward, args, kwargs)
        self.inside.pop()
        return result


def _trace(net: nn.Module, layers: Sequence[str]) -> tuple[fx.Graph, set[str]]:
    """Return the graph of the forward pass, and the names of the modules that it calls."""
    tracer = _LayerTracer(layers)
    arguments = list(inspect.signature(net.forward).parameters.values())
    fixed = {p.name: p.default for p in arguments[1:] if p.default is not p.empty}
    needed = [p.name for p in arguments if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(needed) > 1:
        raise ValueError(
            f"net: got a network that needs {' and '.join(map(repr, needed))}, expected one that needs a single input; "
            "wrap it in a module that fixes the others, or use odeadv.models.from_blocks"
        )
    try:
        return tracer.trace(net, concrete_args=fixed or None), tracer.called
    except Exception as error:
        name, module = tracer.inside[-1] if tracer.inside else ("", net)
        where = f"{name!r} ({type(module).__name__})" if name else type(net).__name__
        raise ValueError(
            f"net: the forward pass of {where} cannot be traced ({error}); name {repr(name) if name else 'a module'} "
            "itself as a layer, or split the network by hand: odeadv.models.from_blocks(stem, "
            "[net.get_submodule(name) for name in layers], head)"
        ) from error


class _Part(NamedTuple):
    """A piece of the traced forward pass.

    Attributes:
        title: name of the layer, or a name of the piece for messages.
        nodes: operations of the piece.
        enters: the input value of the piece.
        leaves: the output value of the piece.
    """

    title: str
    nodes: list[fx.Node]
    enters: fx.Node
    leaves: fx.Node


def _cut(graph: fx.Graph, called: Collection[str], layers: Sequence[str]) -> list[_Part]:
    """Return stem, blocks and head of the traced forward pass, in this order."""
    # Weights that a forward pass reads directly (get_attr) are not operations. Each piece copies the weights it uses.
    nodes = [node for node in graph.nodes if node.op not in ("output", "get_attr")]
    result = next(node for node in graph.nodes if node.op == "output")
    state = next(node for node in nodes if node.op == "placeholder")
    parts: list[_Part] = []
    begin = 0
    for at, layer in sorted((_place(nodes, layer), layer) for layer in layers):
        entering = _crossing(nodes, result, at, f"before {layer!r}", _owner(layer, called))
        # If the state does not change between two layers (for example in a check of its shape), no block is added.
        if not parts or entering is not state:
            title = f"between {parts[-1].title!r} and {layer!r}" if parts else "stem"
            parts.append(_Part(title, nodes[begin:at], state, entering))
            state = entering
        leaving = _crossing(nodes, result, at + 1, f"after {layer!r}", _owner(layer, called))
        parts.append(_Part(layer, [nodes[at]], state, leaving))
        begin, state = at + 1, leaving
    value = result.args[0]
    if not isinstance(value, fx.Node):
        raise ValueError(
            f"net: returns {type(value).__name__}, expected a tensor; join several outputs in one, such as "
            "torch.cat((logits, auxiliary), dim=1), and let loss= take it apart"
        )
    return [*parts, _Part("head", nodes[begin:], state, value)]


def _place(nodes: Sequence[fx.Node], layer: str) -> int:
    """Return the index of the call of ``layer``."""
    found = [n for n, node in enumerate(nodes) if node.op == "call_module" and node.target == layer]
    if len(found) != 1:
        raise ValueError(f"layers: {layer!r} is called {len(found)} times, expected once per forward pass")
    return found[0]


def _owner(layer: str, called: Collection[str]) -> str:
    """Return the name of the innermost module that contains ``layer`` and is called itself; "" without one."""
    owner = layer.rpartition(".")[0]
    while owner and owner not in called:
        owner = owner.rpartition(".")[0]
    return owner


def _crossing(nodes: Sequence[fx.Node], result: fx.Node, at: int, place: str, owner: str) -> fx.Node:
    """Return the single value that passes from the nodes before ``at`` to the other nodes.

    Raises:
        ValueError: if the number of such values is not one. The message names the values.
    """
    after = {*nodes[at:], result}
    found = [node for node in nodes[:at] if any(user in after for user in node.users)]
    if len(found) == 1:
        return found[0]
    shown = " and ".join(repr(_title(node)) for node in reversed(found)) or "none"
    example = f", such as {owner!r}" if owner else ""
    raise ValueError(
        f"layers: {len(found)} tensors cross the cut {place} ({shown}), expected one, the state; name a layer "
        f"that contains the skip{example}; or {PACK}. An argument that all layers share, such as a mask, "
        "can be fixed with odeadv.models.bind and from_blocks"
    )


def _title(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _joined(net: nn.Module, trained: _Part, evaluated: _Part) -> nn.Module:
    """Return the module of a part. If the traces in training and evaluation mode differ, it contains both."""
    first, second = _module(net, trained), _module(net, evaluated)
    if first is second:
        return first
    same = isinstance(first, fx.GraphModule) and isinstance(second, fx.GraphModule) and first.code == second.code
    return first if same else _ByMode(first, second)


def _module(net: nn.Module, part: _Part) -> nn.Module:
    """Return a part as a module. If the part consists of one layer only, return this layer."""
    (first, *others), source = part.nodes or [part.enters], part.enters
    if not others and first.op == "call_module" and first.args == (source,) and not first.kwargs:
        return net.get_submodule(str(first.target))
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {source: graph.placeholder("x")}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            assert node.op == "get_attr", node
            copies[node] = graph.node_copy(node, copied)
        return copies[node]

    for node in part.nodes:
        unused = node.op == "placeholder" and not node.users  # an unused argument of the network, such as **kwargs
        if node not in copies and not unused:
            copies[node] = graph.node_copy(node, copied)
    graph.output(copied(part.leaves))
    graph.lint()
    return fx.GraphModule(net, graph)


class _ByMode(nn.Module):
    """Code that was traced in training and in evaluation mode. It runs the version of its current mode."""

    def __init__(self, trained: nn.Module, evaluated: nn.Module) -> None:
        super().__init__()
        self.trained, self.evaluated = trained, evaluated

    def forward(self, x: Tensor) -> Any:
        """Return the output for ``x`` in the current mode."""
        return (self.trained if self.training else self.evaluated)(x)
