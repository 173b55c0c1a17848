"""Loops over the steps of small states in plain C++: every element of every tensor is a variable of its own.

Inductor allocates tensors in every step, which costs more than the arithmetic of a few elements. Here the graph of a
step becomes a list of assignments in a loop. Only public interfaces are used. A graph with an operation that is not
listed here is left to Inductor.
"""

from __future__ import annotations

import ctypes
import math
import operator
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

# Larger states gain from vector instructions, which Inductor writes. The compiler needs a second for 4000 assignments.
ELEMENTS = 16
ASSIGNMENTS = 4000
_FLAGS = ("-O2", "-shared", "-fPIC", "-std=c++17", "-fno-math-errno", "-ffp-contract=off")

_TYPES = {
    torch.float64: "double",
    torch.float32: "float",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.bool: "bool",
}
# Operations that only move elements, run on the numbers of the elements. They may add zeros; element 0 is zero.
_MOVES = {
    "_unsafe_view", "alias", "cat", "clone", "contiguous", "detach", "diagonal", "diagonal_backward", "expand",
    "flip", "lift_fresh_copy", "permute", "repeat", "reshape", "roll", "select", "select_backward", "slice",
    "slice_backward", "split", "split_with_sizes", "squeeze", "stack", "t", "transpose", "unbind", "unsqueeze", "view"
}  # fmt: skip
_FILLS = {"empty_like": 0, "zeros": 0, "zeros_like": 0, "new_zeros": 0, "ones": 1, "ones_like": 1, "new_ones": 1}
# Operands are converted to the type of the result first.
_ELEMENTWISE = {
    **{name: f"std::{name}({{0}})" for name in ("cos", "sin", "tan", "cosh", "sinh", "tanh", "exp", "expm1", "sqrt")},
    **{name: f"std::{name}({{0}})" for name in ("log", "log1p", "log2", "erf", "abs", "floor", "ceil")},
    **{name: f"std::{name}({{0}})" for name in ("acos", "asin", "atan", "acosh", "asinh", "atanh")},
    "sgn": "({0} > 0) - ({0} < 0)",
    "sign": "({0} > 0) - ({0} < 0)",
    "add": "{0} + {1}",
    "atan2": "std::atan2({0}, {1})",
    "div": "{0} / {1}",
    "masked_fill": "{1} ? {2} : {0}",
    "maximum": "{0} > {1} || {0} != {0} ? {0} : {1}",
    "minimum": "{0} < {1} || {0} != {0} ? {0} : {1}",
    "mul": "{0} * {1}",
    "neg": "-{0}",
    "pow": "std::pow({0}, {1})",
    "reciprocal": "1 / {0}",
    "relu": "{0} < 0 ? 0 : {0}",
    "rsqrt": "1 / std::sqrt({0})",
    "rsub": "{1} - {0}",
    "sigmoid": "1 / (1 + std::exp(-{0}))",
    "sigmoid_backward": "{0} * (1 - {1}) * {1}",
    "silu": "{0} / (1 + std::exp(-{0}))",
    "square": "{0} * {0}",
    "sub": "{0} - {1}",
    "tanh_backward": "{0} * (1 - {1} * {1})",
    "threshold_backward": "{1} <= {2} ? 0 : {0}",
    "_to_copy": "{0}",
    "where": "{0} ? {1} : {2}",
}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_LOGIC = {"and": "{0} && {1}", "or": "{0} || {1}", "xor": "{0} != {1}", "not": "!{0}"}
_POWERS = {0: "1", 1: "{0}", 2: "{0} * {0}", 3: "{0} * {0} * {0}", 0.5: "std::sqrt({0})", -1: "1 / {0}"}


class _UnsupportedError(Exception):
    """The graph cannot be written as assignments."""


def compiler() -> str:
    """Return the name of the C++ compiler, the one that torch takes too."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def forward_loop(graph: fx.GraphModule, tables: int) -> Callable[..., tuple[Tensor, bool]] | None:
    """Return a function of (x, clock, states or None, tables, fixed) that takes all steps.

    It returns first and last state as the rows of a tensor, and True if both are finite. If ``states`` are given, it
    writes each state to the row with its number.

    Args:
        graph: of a step, of (number, x, clock, two rows per table, fixed tensors).
        tables: number of tables.

    Returns:
        The function; or None if the graph is too large or has other operations than those of this file.
    """
    try:
        code = _Code(graph)
        number, x, clock, *others = code.examples
        given = [code.loop_variable("n", number), code.carried("x", x), code.loaded("clock", clock)]
        given += code.rows(others[: 2 * tables])
        given += [code.loaded(f"fixed{k}", tensor) for k, tensor in enumerate(others[2 * tables :])]
        code.results(given, [x])
        size, kind = x.numel(), _TYPES[x.dtype]
        code.inside += [f"x_{k} = y0_{k};" for k in range(size)]
        code.inside += [f"if (states) states[(n + 1) * {size} + {k}] = y0_{k};" for k in range(size)]
        function = code.function(
            [f"const {kind}* x0", f"{kind}* ends", f"{kind}* states"],
            start=[f"{kind} x_{k} = ends[{k}] = x0[{k}];" for k in range(size)],
            loop="for (int64_t n = 0; n < count; ++n)",
            end=[f"ends[{size + k}] = x_{k}; finite &= (x_{k} + x0[{k}]) * 0 == 0;" for k in range(size)],
            tables=(x.dtype, tables),
            fixed=others[2 * tables :],
        )
    except _UnsupportedError:
        return None

    def run(
        x: Tensor, clock: Tensor, states: Tensor | None, tables: Sequence[Tensor], fixed: Sequence[Tensor]
    ) -> tuple[Tensor, bool]:
        ends = x.new_empty((2, *x.shape))
        return ends, function((clock, x, ends, states, *tables, *fixed))

    return run


def reverse_loop(graph: fx.GraphModule, tables: int, lifted: int) -> Callable[..., Sequence[Tensor]] | None:
    """Return a function of (nodes, clock, states, tables, fixed, sums) that pulls back through all steps.

    It adds to each row of ``nodes`` the pull-back of the next one, and to ``sums`` the pull-backs by lifted tensors. It
    returns the first row and ``sums``.

    Args:
        graph: of a pull-back, of (number, x, clock, two rows per table, lifted tensors, costate, other fixed tensors).
        tables: number of tables.
        lifted: number of lifted tensors.

    Returns:
        The function, or None as for `forward_loop`.
    """
    try:
        code = _Code(graph)
        number, x, clock, *others = code.examples
        at = 2 * tables + lifted
        a, fixed = others[at], [*others[2 * tables : at], *others[at + 1 :]]
        size, kind = x.numel(), _TYPES[x.dtype]
        given = [
            code.loop_variable("n", number),
            code.loaded("states", x, "n", inside=True),
            code.loaded("clock", clock),
        ]
        given += code.rows(others[: 2 * tables])
        constants = [code.loaded(f"fixed{k}", tensor) for k, tensor in enumerate(fixed)]
        given += [*constants[:lifted], code.carried("a", a), *constants[lifted:]]
        outputs = [node.meta["val"] for node in _outputs(graph)]
        code.results(given, outputs)
        code.inside += [f"nodes[n * {size} + {k}] = a_{k} = nodes[n * {size} + {k}] + y0_{k};" for k in range(size)]
        parameters = [f"{kind}* nodes", f"const {kind}* states"]
        for j, part in enumerate(outputs[1:]):
            parameters.append(f"{_type(part.dtype)}* sum{j}")
            code.inside += [f"sum{j}[{k}] += y{j + 1}_{k};" for k in range(part.numel())]
        function = code.function(
            parameters,
            start=[f"{kind} a_{k} = nodes[count * {size} + {k}];" for k in range(size)],
            loop="for (int64_t n = count - 1; n >= 0; --n)",
            end=[],
            tables=(x.dtype, tables),
            fixed=fixed,
        )
    except _UnsupportedError:
        return None

    def run(
        nodes: Tensor,
        clock: Tensor,
        states: Tensor,
        tables: Sequence[Tensor],
        fixed: Sequence[Tensor],
        sums: Sequence[Tensor],
    ) -> Sequence[Tensor]:
        function((clock, nodes, states, *sums, *tables, *fixed))
        return (nodes[0], *sums)

    return run


def _outputs(graph: fx.GraphModule) -> list[fx.Node]:
    (found,) = next(node for node in graph.graph.nodes if node.op == "output").args
    return list(found) if isinstance(found, tuple | list) else [found]


def _type(dtype: torch.dtype) -> str:
    if dtype not in _TYPES:
        raise _UnsupportedError(str(dtype))
    return _TYPES[dtype]


class _Code:
    """The assignments of a graph. A tensor is an int64 tensor of the numbers of its elements.

    Attributes:
        examples: the inputs of the graph, without values.
        before: assignments before the loop, of what is the same for every step.
        inside: assignments in the loop.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        self.examples: list[Tensor] = [n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder"]
        if self.examples[1].numel() > ELEMENTS or self.examples[1].device.type != "cpu":
            raise _UnsupportedError("state")
        self.before: list[str] = []
        self.inside: list[str] = []
        self._names, self._dtypes = ["0"], [None]  # type: list[str], list[torch.dtype | None]
        self._varying: set[int] = set()
        self._known: dict[tuple[str, torch.dtype], int] = {}

    def loop_variable(self, name: str, like: Tensor) -> Tensor:
        """Return a scalar that the loop sets."""
        return torch.tensor(self._element(name, like.dtype, varies=True))

    def carried(self, name: str, like: Tensor) -> Tensor:
        """Return a tensor whose elements are variables that go from step to step."""
        found = [self._element(f"{name}_{k}", like.dtype, varies=True) for k in range(like.numel())]
        return torch.tensor(found, dtype=torch.int64).reshape(like.shape)

    def loaded(self, name: str, like: Tensor, row: str = "0", *, inside: bool = False) -> Tensor:
        """Return a tensor in memory; of rows like ``like`` the one with the number ``row``."""
        size = like.numel()
        if size > ASSIGNMENTS:
            raise _UnsupportedError(name)
        found = [self._assigned(f"{name}[({row}) * {size} + {k}]", like.dtype, varies=inside) for k in range(size)]
        return torch.tensor(found, dtype=torch.int64).reshape(like.shape)

    def rows(self, examples: Sequence[Tensor]) -> list[Tensor]:
        """Return the rows n and n + 1 of each table in turn."""
        return [self.loaded(f"table{k // 2}", like, f"n + {k % 2}", inside=True) for k, like in enumerate(examples)]

    def results(self, given: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """Assign the outputs of the graph of ``given`` inputs to ``y0_0`` and so on, and return them."""
        inputs, values = iter(given), {}  # type: Any, dict[fx.Node, Any]
        for node in self._graph.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(inputs)
            elif node.op == "get_attr":
                values[node] = self._constant(getattr(self._graph, node.target))
            elif node.op == "call_function":
                values[node] = self._applied(node, values)
        found = [values[node] for node in _outputs(self._graph)]
        for j, (ids, example) in enumerate(zip(found, like, strict=True)):
            kind = _type(example.dtype)
            for k, i in enumerate(ids.reshape(-1).tolist()):
                if self._dtypes[i] not in (None, example.dtype):
                    raise _UnsupportedError("output")
                self.inside.append(f"const {kind} y{j}_{k} = {self._names[i]};")
        return found

    def function(
        self,
        parameters: Sequence[str],
        *,
        start: Sequence[str],
        loop: str,
        end: Sequence[str],
        tables: tuple[torch.dtype, int],
        fixed: Sequence[Tensor],
    ) -> Callable[[Iterable[Tensor | None]], bool]:
        """Compile the loop: a function of clock, ``parameters``, tables and fixed tensors that returns ``finite``."""
        every = ["const double* clock", *parameters]
        every += [f"const {_type(tables[0])}* table{k}" for k in range(tables[1])]
        every += [f"const {_type(tensor.dtype)}* fixed{k}" for k, tensor in enumerate(fixed)]
        body = [*self.before, "const int64_t count = (int64_t)clock[3];", "bool finite = true;", *start]
        body += [f"{loop} {{", *self.inside, "}", *end, "return finite;"]
        lines = ["#include <cmath>", "#include <cstdint>", f'extern "C" bool run({", ".join(every)}) {{', *body, "}"]
        call = _built("\n".join(lines))
        call.argtypes, call.restype = [ctypes.c_void_p] * len(every), ctypes.c_bool

        def run(tensors: Iterable[Tensor | None]) -> bool:
            # A copy must live as long as the call.
            kept = [tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous() for tensor in tensors]
            finite: bool = call(*[None if tensor is None else tensor.data_ptr() for tensor in kept])
            return finite

        return run

    def _element(self, name: str, dtype: torch.dtype | None, *, varies: bool) -> int:
        self._names.append(name)
        self._dtypes.append(dtype)
        if varies:
            self._varying.add(len(self._names) - 1)
        return len(self._names) - 1

    def _assigned(self, text: str, dtype: torch.dtype, *, varies: bool) -> int:
        """Return the element with the value ``text``."""
        if (text, dtype) not in self._known:
            if len(self._names) > ASSIGNMENTS:
                raise _UnsupportedError("too many assignments")
            name = f"v{len(self._names)}"
            (self.inside if varies else self.before).append(f"const {_type(dtype)} {name} = {text};")
            self._known[text, dtype] = self._element(name, dtype, varies=varies)
        return self._known[text, dtype]

    def _constant(self, tensor: Tensor) -> Tensor:
        if tensor.numel() > ASSIGNMENTS:
            raise _UnsupportedError("constant")
        found = [self._assigned(_number(value), tensor.dtype, varies=False) for value in tensor.reshape(-1).tolist()]
        return torch.tensor(found, dtype=torch.int64).reshape(tensor.shape)

    def _applied(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """Return the value of a call."""
        args: Any = fx.node.map_arg(node.args, values.__getitem__)
        kwargs: Any = node.kwargs
        if node.target is operator.getitem:
            return args[0][args[1]]
        target: Any = node.target
        schema = getattr(target, "_schema", None)
        if schema is None or schema.is_mutable:
            raise _UnsupportedError(str(target))
        name, like = target.overloadpacket.__name__, node.meta["val"]
        if target is torch.ops.aten.view.dtype:
            return args[0]  # to integers and back, see `_constant` of the compiled solver; others are found below
        if name in _MOVES:
            return target(*args)
        for source in node.all_input_nodes:
            self._check_types(values[source], source.meta["val"].dtype)
        dtype = like.dtype
        if name in _FILLS or name in ("fill", "full", "full_like", "scalar_tensor"):
            value = _FILLS[name] if name in _FILLS else args[0 if name == "scalar_tensor" else 1]
            return torch.full(like.shape, self._assigned(_number(value), dtype, varies=False))
        if name in ("mm", "mv", "dot", "bmm"):
            return self._product(args[0], args[1], dtype)
        if name in ("addmm", "addmv") and not kwargs:
            return self._elementwise("{0} + {1}", (args[0], self._product(args[1], args[2], dtype)), dtype, dtype)
        if name in ("sum", "mean"):
            return self._sum(args, like, mean=name == "mean")
        if name in _COMPARISONS:
            given: Any = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in node.args]
            return self._elementwise(f"{{0}} {_COMPARISONS[name]} {{1}}", args, torch.bool, torch.result_type(*given))
        if dtype == torch.bool and name.startswith(("logical_", "bitwise_")):
            return self._elementwise(_LOGIC[name.partition("_")[2]], args, torch.bool, torch.bool)
        template = _ELEMENTWISE.get(name)
        if template is None or kwargs.keys() - {"alpha", "dtype", "memory_format", "device", "layout", "pin_memory"}:
            raise _UnsupportedError(str(target))
        if kwargs.get("alpha", 1) != 1:
            template = template.replace("{1}", f"{_number(kwargs['alpha'])} * {{1}}")
        if name == "pow" and not isinstance(args[1], Tensor):
            template = _POWERS.get(args[1], template)
        return self._elementwise(template, args, dtype, dtype)

    def _check_types(self, value: Any, dtype: torch.dtype) -> None:
        if any(self._dtypes[i] not in (None, dtype) for i in value.reshape(-1).tolist()):
            raise _UnsupportedError("bits of another type")

    def _elementwise(self, template: str, args: Sequence[Any], dtype: torch.dtype, inner: torch.dtype) -> Tensor:
        """Return ``template`` of the elements of ``args``, numbers among them, as type ``inner`` each."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))  # type: ignore[no-untyped-call]
        columns = [arg.expand(shape).reshape(-1).tolist() if isinstance(arg, Tensor) else _number(arg) for arg in args]
        found = []
        for k in range(math.prod(shape)):
            picked = [column if isinstance(column, str) else column[k] for column in columns]
            if template == "{0} + {1}" and 0 in picked and dtype == inner:
                other = picked[1] if picked[0] == 0 else picked[0]
                if isinstance(other, int) and self._dtypes[other] in (None, dtype):
                    found.append(other)
                    continue
            texts = [self._converted(item, inner) for item in picked]
            varies = any(item in self._varying for item in picked if isinstance(item, int))
            found.append(self._assigned(template.format(*texts), dtype, varies=varies))
        return torch.tensor(found, dtype=torch.int64).reshape(shape)

    def _converted(self, item: int | str, dtype: torch.dtype) -> str:
        """Return an element or a literal as ``dtype``; conditions stay as they are."""
        if isinstance(item, int) and self._dtypes[item] in (dtype, torch.bool):
            return self._names[item]
        return f"({_type(dtype)}){item if isinstance(item, str) else self._names[item]}"

    def _product(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the product of matrices or vectors."""
        columns = b.unsqueeze(-1) if b.ndim == 1 else b
        products = self._elementwise("{0} * {1}", (a.unsqueeze(-1), columns.unsqueeze(-3)), dtype, dtype)
        found = self._added(products.movedim(-2, -1), dtype)
        return found.squeeze(-1) if b.ndim == 1 else found

    def _sum(self, args: Sequence[Any], like: Tensor, *, mean: bool) -> Tensor:
        ids, dims = args[0], args[1] if len(args) > 1 else None
        chosen = sorted({d % ids.ndim for d in dims}) if dims else list(range(ids.ndim))
        others = [d for d in range(ids.ndim) if d not in chosen]
        rows = ids.permute(*others, *chosen).reshape(*(ids.shape[d] for d in others), -1)
        count = rows.shape[-1]
        found = self._added(rows, like.dtype)
        if mean:
            found = self._elementwise("{0} / {1}", (found, count), like.dtype, like.dtype)
        return found.reshape(like.shape)

    def _added(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the sums over the last axis."""
        if ids.shape[-1] == 0:
            return torch.zeros(ids.shape[:-1], dtype=torch.int64)
        total = ids[..., 0]
        for part in ids.unbind(-1)[1:]:
            total = self._elementwise("{0} + {1}", (total, part), dtype, dtype)
        return total


def _number(value: Any) -> str:
    """Return a Python number as C++."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, int | float):
        raise _UnsupportedError(repr(value))
    if math.isfinite(value):
        return f"({value!r})"
    return "NAN" if math.isnan(value) else f"({'-' if value < 0 else ''}INFINITY)"


def _built(source: str) -> Any:
    """Return the function ``run`` of a C++ program."""
    if sys.platform == "win32":
        raise _UnsupportedError("compiler")
    with tempfile.TemporaryDirectory() as folder:
        code, library = Path(folder) / "loop.cpp", Path(folder) / "loop.so"
        code.write_text(source, encoding="utf-8")
        try:
            subprocess.run([compiler(), *_FLAGS, str(code), "-o", str(library)], check=True, capture_output=True)
            return ctypes.CDLL(str(library)).run
        except (OSError, subprocess.CalledProcessError):
            raise _UnsupportedError("compiler") from None
