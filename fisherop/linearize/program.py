"""A straight-line linear program: simplified once, then run on one vector or, by vmap, on a block of them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, fx

aten = torch.ops.aten


class Program:
    """A recorded linear computation from one tensor to another.

    Parameters
    ----------
    graph : fx.Graph
        One placeholder, operations without side effects, one output; ``node.meta`` holds the shape of every value.
    constants : dict of str to Tensor
        The tensors that the graph's attributes name.
    """

    def __init__(self, graph: fx.Graph, constants: dict[str, Tensor]) -> None:
        self.graph = graph
        self.constants = constants
        self.derivatives: dict[Any, tuple[Tensor, list[Tensor]]] = {}

    def peak_bytes(self) -> int:
        """Return the most memory that the values of one vector take at any time."""
        last = {used: node for node in self.graph.nodes for used in node.all_input_nodes}
        alive = peak = 0
        for node in self.graph.nodes:
            alive += _node_bytes(node)
            peak = max(peak, alive)
            alive -= sum(_node_bytes(used) for used in {*node.all_input_nodes} if last[used] is node)
        return max(peak, 1)

    def dtypes(self) -> set[torch.dtype]:
        """Return the dtypes of its values."""
        return {node.meta["dtype"] for node in self.graph.nodes if "dtype" in node.meta}

    def simplified(self, derivatives: dict[Any, tuple[Tensor, list[Tensor]]]) -> Program:
        """Remove what does nothing, fold constants, and write every linear step in its plainest form.

        `derivatives` collects the slopes of pointwise functions, which a program shares with its transpose, each with
        the points that it was taken at: they are known by their addresses, which are theirs only while they live.
        """
        self.derivatives = derivatives
        for node in list(self.graph.nodes):
            rule = _RULES.get(node.target)
            if rule is not None and node.users:
                rule(self, node)
        self.sweep()
        return self

    def part_from(self, memory: set[int]) -> None:
        """Copy the constants that share memory which others go on writing."""
        shared = {name: value for name, value in self.constants.items() if memory_key(value) in memory}
        self.constants |= {name: value.clone() for name, value in shared.items()}

    def sweep(self) -> None:
        """Drop dead operations and the constants that only they read."""
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node.op in ("call_function", "get_attr"):
                self.graph.erase_node(node)
        read = {node.target for node in self.graph.nodes if node.op == "get_attr"}
        self.constants = {name: value for name, value in self.constants.items() if name in read}
        self.graph.lint()

    def constant(self, node: Any) -> Tensor | None:
        """Return a node's value where it is a constant."""
        return self.constants[str(node.target)] if isinstance(node, fx.Node) and node.op == "get_attr" else None

    def insert(self, before: fx.Node, func: Any, *args: Any) -> fx.Node:
        """Add an operation before a node; tensors among its arguments become constants."""
        call = tuple(self.attribute(before, arg) if isinstance(arg, Tensor) else arg for arg in args)
        with self.graph.inserting_before(before):
            node = self.graph.call_function(func, call)
        node.meta.update(before.meta)
        return node

    def replace(self, node: fx.Node, by: fx.Node) -> None:
        """Let every reader of a node read another."""
        node.replace_all_uses_with(by)

    def attribute(self, before: fx.Node, tensor: Tensor) -> fx.Node:
        """Add a constant before a node, under the node's own name, which the graph never gives again."""
        with self.graph.inserting_before(before):
            node = self.graph.get_attr("folded")
        node.target = node.name
        self.constants[node.name] = tensor
        return node


def compiled(program: Program) -> Callable[[Tensor], Tensor]:
    """Return a program as a Python function of its variable."""
    return bound(code(program), program.constants)


def code(program: Program) -> Callable[[Any, Tensor], Tensor]:
    """Return a program as a Python function of the holder of its constants, and its variable."""
    source = program.graph.python_code(root_module="self")
    scope: dict[str, Any] = dict(source.globals)
    exec(source.src, scope)
    return cast("Callable[[Any, Tensor], Tensor]", scope["forward"])


def bound(function: Callable[[Any, Tensor], Tensor], constants: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a program's code with constants to read, which may have another layout than those it was written for."""
    holder = SimpleNamespace(**constants)
    return lambda variable: function(holder, variable)


def bytes_of(tensor: Tensor) -> int:
    """Return the memory behind a tensor."""
    if tensor.is_sparse:
        return int(tensor._nnz()) * (tensor.element_size() + 8 * tensor.sparse_dim())
    return int(tensor.untyped_storage().nbytes()) if tensor.layout is torch.strided else int(tensor.nbytes)


def memory_key(tensor: Tensor) -> int:
    """Return what tensors that share memory have in common."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else -id(tensor)


def _node_bytes(node: fx.Node) -> int:
    if node.op == "get_attr" or "shape" not in node.meta:
        return 0
    return math.prod(node.meta["shape"]) * int(node.meta["dtype"].itemsize)


def shape_of(node: Any) -> tuple[int, ...]:
    """Return the shape of a node's value."""
    return tuple(node.meta["shape"])


def _drop_if_unchanged(program: Program, node: Any) -> None:
    source = node.args[0]
    if isinstance(source, fx.Node) and source.op != "get_attr":
        same = shape_of(source) == shape_of(node) and source.meta["dtype"] == node.meta["dtype"]
        if same:
            program.replace(node, source)
        elif node.target in (aten.view.default, aten._unsafe_view.default):
            # What was contiguous when recorded may not be once a copy before it is dropped.
            node.target = aten.reshape.default


def _zeros(program: Program, node: Any) -> None:
    """Take zeros for a constant, of one number in memory."""
    zero = torch.zeros((), dtype=node.meta["dtype"], device=node.meta["device"])
    program.replace(node, program.attribute(node, zero.expand(shape_of(node))))


def _add(program: Program, node: Any) -> None:
    """Drop the addition of zero."""
    for value, other in ((0, 1), (1, 0)):
        constant = program.constant(node.args[other])
        kept = node.args[value]
        if constant is None or constant.any() or not isinstance(kept, fx.Node) or program.constant(kept) is not None:
            continue
        same = shape_of(kept) == shape_of(node) and kept.meta["dtype"] == node.meta["dtype"]
        if same and (value == 0 or node.kwargs.get("alpha", 1) == 1):
            program.replace(node, kept)
            return


def _mul(program: Program, node: Any) -> None:
    """Put the constant second, join it with that of a product before, and fold it into a convolution before."""
    value, factor = node.args
    if program.constant(value) is not None or not isinstance(value, fx.Node):
        value, factor = factor, value
    if isinstance(factor, fx.Node):
        scale = program.constant(factor)
    else:
        scale = torch.tensor(factor, dtype=node.meta["dtype"], device="cpu")
    if scale is None or not isinstance(value, fx.Node) or {scale.dtype, _dtype(program, value)} != {node.meta["dtype"]}:
        return
    if scale.numel() == 1 and scale.item() == 1 and shape_of(value) == shape_of(node):
        program.replace(node, value)
    elif len(value.users) == 1 and value.target is aten.mul.Tensor and program.constant(value.args[1]) is not None:
        first = program.constant(value.args[1])
        if first is not None and first.dtype == scale.dtype and _no_larger(first, scale):
            joint = program.insert(node, aten.mul.Tensor, value.args[0], first * scale)
            program.replace(node, joint)
            _mul(program, joint)
    elif len(value.users) == 1 and value.target is aten.convolution.default and _per_channel(scale, shape_of(node)):
        weight = program.constant(value.args[1])
        transposed = value.args[6]
        if weight is not None and value.args[2] is None and not transposed:
            folded = weight * _channels(scale, weight.shape[0]).reshape(-1, *[1] * (weight.ndim - 1))
            program.replace(node, program.insert(node, value.target, value.args[0], folded, *value.args[2:]))
        else:
            node.args = (value, factor)
    else:
        node.args = (value, factor)


def _dtype(program: Program, node: fx.Node) -> torch.dtype:
    constant = program.constant(node)
    return node.meta["dtype"] if constant is None else constant.dtype


def _pointwise(program: Program, node: Any) -> None:
    """Write the derivative of a pointwise function as a product with its slope, computed once."""
    variable, *rest = node.args
    found = [program.constant(arg) for arg in rest if isinstance(arg, fx.Node)]
    points = [point for point in found if point is not None]
    if len(points) < len(found) or program.constant(variable) is not None:
        return
    if shape_of(variable) != shape_of(node) or variable.meta["dtype"] != node.meta["dtype"]:
        return
    values = [program.constant(arg) if isinstance(arg, fx.Node) else arg for arg in rest]
    places = [(point.data_ptr(), tuple(point.shape), point.stride()) for point in points]
    key = (
        node.target,
        shape_of(node),
        *places,
        str([v for v in values if not isinstance(v, Tensor)]),
        str(node.kwargs),
    )
    if key not in program.derivatives:
        ones = torch.ones(shape_of(node), dtype=node.meta["dtype"], device=points[0].device)
        program.derivatives[key] = node.target(ones, *values, **node.kwargs), points
    slope, _ = program.derivatives[key]
    program.replace(node, program.insert(node, aten.mul.Tensor, variable, slope))


def _no_larger(first: Tensor, second: Tensor) -> bool:
    """Tell whether the product of two constants takes no more memory than the larger of them."""
    return torch.broadcast_shapes(first.shape, second.shape) in (first.shape, second.shape)


def _per_channel(scale: Tensor, shape: tuple[int, ...]) -> bool:
    """Tell whether a constant multiplies each channel (dimension 1) by one number."""
    aligned = (1,) * (len(shape) - scale.ndim) + tuple(scale.shape)
    return all(size == 1 for axis, size in enumerate(aligned) if axis != 1)


def _channels(scale: Tensor, count: int) -> Tensor:
    return scale.reshape(-1).expand(count) if scale.numel() == 1 else scale.reshape(-1)


def _batch_norm_backward(program: Program, node: Any) -> None:
    """Write the transpose of batch normalization in evaluation mode as what it is: a factor for every channel."""
    gradient, _, weight, _, variance, _, _, train, eps, _ = node.args
    spread, gain = program.constant(variance), program.constant(weight)
    if train or spread is None or (weight is not None and gain is None):
        return
    scale = torch.rsqrt(spread + eps)
    scale = scale if gain is None else scale * gain
    for item in list(node.users):
        if item.target is operator.getitem and item.args[1] == 0:
            shape = (1, -1) + (1,) * (len(shape_of(item)) - 2)
            product = program.insert(item, aten.mul.Tensor, gradient, scale.reshape(shape))
            program.replace(item, product)
            _mul(program, product)


def _convolution_backward(program: Program, node: Any) -> None:
    """Write the gradient of a convolution's input as a transposed convolution; fold a factor that precedes it.

    The input itself is not needed, only its size: a large constant less.
    """
    gradient, source, weight, _, stride, padding, dilation, transposed, _, groups, _ = node.args
    kernel, like = program.constant(weight), program.constant(source)
    if kernel is None or like is None or transposed:
        return
    gradient, kernel = _unscaled(program, gradient, kernel)
    spatial = kernel.shape[2:]
    rest = [
        like.shape[2 + i]
        - ((shape_of(gradient)[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (spatial[i] - 1) + 1)
        for i in range(len(spatial))
    ]
    for item in list(node.users):
        if item.target is operator.getitem and item.args[1] == 0:
            kernel_node: Any = weight if kernel is program.constant(weight) else kernel
            step = program.insert(
                item,
                aten.convolution.default,
                gradient,
                kernel_node,
                None,
                stride,
                padding,
                dilation,
                True,
                rest,
                groups,
            )
            program.replace(item, step)


def _unscaled(program: Program, gradient: Any, kernel: Tensor) -> tuple[Any, Tensor]:
    """Move a factor for every channel from a gradient to the kernel that it meets."""
    if gradient.target is aten.mul.Tensor and len(gradient.users) == 1:
        scale = program.constant(gradient.args[1])
        if scale is not None and _per_channel(scale, shape_of(gradient)):
            factors = _channels(scale, kernel.shape[0]).reshape(-1, *[1] * (kernel.ndim - 1))
            return gradient.args[0], kernel * factors
    return gradient, kernel


_RULES: dict[Any, Callable[[Program, Any], None]] = {
    aten.expand.default: _drop_if_unchanged,
    aten._to_copy.default: _drop_if_unchanged,
    aten.clone.default: _drop_if_unchanged,
    aten.contiguous.default: _drop_if_unchanged,
    aten.reshape.default: _drop_if_unchanged,
    aten.new_zeros.default: _zeros,
    aten.zeros_like.default: _zeros,
    aten._new_zeros_with_same_feature_meta.default: _zeros,
    aten.add.Tensor: _add,
    aten.mul.Tensor: _mul,
    aten.mul.Scalar: _mul,
    aten.gelu_backward.default: _pointwise,
    aten.silu_backward.default: _pointwise,
    aten.hardswish_backward.default: _pointwise,
    aten.hardsigmoid_backward.default: _pointwise,
    aten.elu_backward.default: _pointwise,
    aten.softplus_backward.default: _pointwise,
    aten.sigmoid_backward.default: _pointwise,
    aten.tanh_backward.default: _pointwise,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
    aten.convolution_backward.default: _convolution_backward,
}
