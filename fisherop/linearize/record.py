"""Record a linear computation as a straight-line program of tensor operations.

A dispatch mode sees every operation that runs beneath autograd. Those whose inputs depend on the tangent (or cotangent)
are written down as they come; everything else is a constant of the linearization point, so the model may branch on
values of the image as it likes. The program holds no autograd, no writes in place and no Python of the model.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from fisherop.linearize.autodiff import Product, cotangent_for, dual_level, random_like
from fisherop.linearize.checks import adjoint
from fisherop.linearize.modes import Verdict, judged
from fisherop.linearize.program import Program, aten, compiled, memory_key
from fisherop.linearize.watch import Watch

DOUBT = 100
"""Roundings that forward and reverse mode may differ by: four times as many as in any network of torchvision's."""


class RecordError(RuntimeError):
    """A computation that cannot be written as a straight-line program; the message names the operation."""


@dataclass
class Recording:
    """Both programs of a model at an image, and what they were recorded with.

    Attributes
    ----------
    response : Tensor
        The model's response in the recorded pass.
    jvp, vjp : Program or None
        J and its transpose, None where they are zero.
    depends : bool
        Whether autograd sees the response depend on the image at all.
    probes : dict of str to (Tensor, Tensor)
        For "J" and "Jt": a vector, and its product by autograd itself.
    verdict : Verdict or None
        Where forward and reverse mode contradict each other: which of them is right.
    """

    response: Tensor
    jvp: Program | None
    vjp: Program | None
    depends: bool
    probes: dict[str, tuple[Tensor, Tensor]]
    verdict: Verdict | None = None


def record(respond: Product, image: Tensor, watch: Watch) -> Recording:
    """Record J and its transpose in one pass through the model forward and one backward.

    J comes from forward-mode differentiation, which runs beside the primal pass; its transpose from the primal's own
    graph, so that nothing is differentiated twice. Both read the same intermediate values. Where an operation has no
    forward mode, J is the derivative of the recorded transpose, which is linear. Where the two contradict each other,
    one is the derivative of the other: of reverse mode's, unless a difference quotient confirms forward mode. What the
    model reads is watched.
    """
    leaf = image.clone().requires_grad_()
    (tangent,) = random_like(image)
    response, change, jvp = _forward(respond, leaf, tangent, watch)
    if not response.requires_grad:
        return Recording(response.detach(), None, None, False, {})
    cotangent = cotangent_for(image, response, change)
    try:
        vjp, gradient = _backward(response, leaf, cotangent)
    except RuntimeError:
        if change is None:
            raise
        change = None  # a checkpoint's graph cannot be walked back where tangents went through it
        with torch.enable_grad():
            response = respond(leaf)
        vjp, gradient = _backward(response, leaf, cotangent)
    response, verdict = response.detach(), None
    change = change.detach() if change is not None and change.isfinite().all() else None
    if change is not None and not adjoint(tangent, change, cotangent, gradient, slack=DOUBT):
        verdict = judged(respond, image, response, tangent, change, cotangent, gradient)
        if verdict is not None and verdict.forward:
            vjp, gradient = _transposed(jvp, tangent, cotangent)
        else:
            change = None
    if change is None:
        jvp, change = _transposed(vjp, cotangent, tangent)
    probes = {"J": (tangent, change), "Jt": (cotangent, gradient)}
    return Recording(response, jvp, vjp, True, probes, verdict)


def _backward(response: Tensor, leaf: Tensor, cotangent: Tensor) -> tuple[Program | None, Tensor]:
    recorder = Recorder(cotangent)
    with recorder:
        (gradient,) = torch.autograd.grad(response, leaf, cotangent, materialize_grads=True)
    return recorder.program(gradient), gradient


def _forward(
    respond: Product, leaf: Tensor, tangent: Tensor, watch: Watch
) -> tuple[Tensor, Tensor | None, Program | None]:
    """Run the model; return its response, the change by forward mode, and J; no change where that has no rule."""
    enabled = torch._C._get_mkldnn_enabled()
    for fused in (enabled, False):  # oneDNN's fused LSTM has neither forward mode nor a second derivative
        recorder = Recorder(tangent, watch)
        try:
            torch._C._set_mkldnn_enabled(fused)  # mkldnn.flags() would set TF32 too, and warn
            with torch.enable_grad(), dual_level(), recorder:
                response, change = forward_ad.unpack_dual(respond(forward_ad.make_dual(leaf, tangent)))
                change = torch.zeros_like(response) if change is None else change
            return response, change, recorder.program(change)
        except (RuntimeError, NotImplementedError):
            pass
        finally:
            torch._C._set_mkldnn_enabled(enabled)
    with torch.enable_grad(), watch:
        return respond(leaf), None, None


def _transposed(program: Program | None, point: Tensor, tangent: Tensor) -> tuple[Program | None, Tensor]:
    """Record the transpose of a linear program, by reverse mode through it."""
    if program is None:
        return None, torch.zeros_like(point)
    leaf = torch.zeros_like(point, requires_grad=True)
    with torch.enable_grad():
        result = compiled(program)(leaf)
    recorder = Recorder(tangent)
    with recorder:
        (change,) = torch.autograd.grad(result, leaf, tangent.view_as(result), materialize_grads=True)
    return recorder.program(change), change


@dataclass
class _Value:
    """A recorded tensor, the node that computes it, and the state of its memory when it did."""

    tensor: Tensor
    node: fx.Node
    version: int


@dataclass
class _Memory:
    """Memory that depends on the tangent: how often it was written, and the latest writer."""

    version: int
    writer: _Value | None


@dataclass
class _Constant:
    """A tensor that the program reads, under the name of its attribute."""

    tensor: Tensor
    node: fx.Node
    copy: Tensor | None = None

    @property
    def value(self) -> Tensor:
        # Detached: the program must not see that a module later replaces its weight's data. Read outside the mode, this
        # shares the original's count of writes.
        return self.tensor.detach() if self.copy is None else self.copy


class Recorder(TorchDispatchMode):
    """Write down what depends on `variable` while the mode is active.

    Parameters
    ----------
    variable : Tensor
        The tangent or cotangent.
    watch : Watch, optional
        Told of every tensor that an operation reads.
    """

    def __init__(self, variable: Tensor, watch: Watch | None = None) -> None:
        super().__init__()
        self.watch = watch
        self.graph = fx.Graph()
        self._values: dict[int, _Value] = {}
        self._memory: dict[int, _Memory] = {}
        self._constants: dict[int, _Constant] = {}
        self._constants_in: dict[int, list[_Constant]] = {}
        self._zero: dict[Any, Tensor] = {}
        self._track(variable, self.graph.placeholder("variable"))

    def program(self, result: Tensor) -> Program | None:
        """Return the program for a tensor computed under the mode; None if it is zero whatever the variable."""
        if not self._depends(result):
            if result.any():
                raise RecordError("part of the derivative leaves torch's operations")
            return None
        self.graph.output(self._node(result))
        return Program(self.graph, {str(c.node.target): c.value for c in self._constants.values()})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._efficientzerotensor.default:  # torch crashes where one meets a dispatch mode
            return self._zeros(args[0], kwargs["dtype"], kwargs["device"])
        if func in _PRODUCTS and self._product_vanishes(args):
            like = func(*_mapped(lambda t: torch.empty_like(t, device="meta"), args), **kwargs)
            return self._zeros(like.shape, like.dtype, args[0].device)
        inputs = _tensors((args, kwargs))
        if self.watch is not None:
            self.watch.add(inputs)
        written = _written(func, args, kwargs)
        if not any(self._depends(tensor) for tensor in inputs):
            for tensor in written:
                self._keep_constants_of(tensor)
            return func(*args, **kwargs)
        if written:
            return self._write(func, args, kwargs, written)
        if func in _ALIASES and self._depends(args[0]):
            output = func(*args, **kwargs)
            self._track(output, self._node(args[0]))
            return output
        if func is aten.as_strided.default:
            # Strides and offset speak of this memory, which has another layout when the program runs.
            output = func(*args, **kwargs)
            self._track(output, self._view(self._writer(args[0]), output))
            return output
        call = _mapped(self._node, (args, kwargs))
        output = func(*args, **kwargs)
        if func in _PLAIN:
            func, count = _PLAIN[func]
            call = call[0][:count], {}
        node = self.graph.call_function(func, *call)
        self._track_output(func, output, node)
        return output

    def _zeros(self, shape: Any, dtype: torch.dtype, device: Any) -> Tensor:
        """Return zeros that take no memory: the tangents of weights, of which a product is zero, and not computed."""
        key = dtype, torch.device(device)
        if key not in self._zero:
            self._zero[key] = torch.zeros((), dtype=dtype, device=device)
        return self._zero[key].expand(shape)

    def _product_vanishes(self, args: Any) -> bool:
        zeros = {memory_key(zero) for zero in self._zero.values()}
        biased = len(args) > 2 and args[2] is not None
        return not biased and any(memory_key(factor) in zeros for factor in args[:2])

    def _track_output(self, func: Any, output: Any, node: fx.Node) -> None:
        if isinstance(output, Tensor):
            self._track(output, node)
        elif isinstance(output, (tuple, list)):
            for i, part in enumerate(output):
                if isinstance(part, Tensor):
                    self._track(part, self.graph.call_function(operator.getitem, (node, i)))
        elif func in _READS_VALUES:
            raise RecordError(f"{func} reads a value of the derivative")

    def _write(self, func: Any, args: Any, kwargs: Any, written: list[Tensor]) -> Any:
        """Record an operation in place as one that returns a new tensor, and rebind the memory to it."""
        target = args[0] if args else None
        if len(written) != 1 or written[0] is not target:
            raise RecordError(f"{func} writes to other memory than its first argument")
        if target.is_conj() or target.is_neg():
            raise RecordError(f"{func} writes through a conjugated or negated view")
        before = self._whole(target) if not _fills_memory(target) else None
        self._keep_constants_of(target)
        node = self._out_of_place(func, args, kwargs)
        output = func(*args, **kwargs)
        key = memory_key(target)
        memory = self._memory.setdefault(key, _Memory(0, None))
        memory.version += 1
        if before is not None:
            flat = self.graph.call_function(aten.reshape.default, (node, [-1]))
            whole = self.graph.call_function(
                aten.index_copy.default, (before, 0, self._constant(_places(target)), flat)
            )
            describe(flat, target.reshape(-1))
            describe(whole, _flat(target))
            memory.writer = _Value(_flat(target), whole, memory.version)
        else:
            memory.writer = _Value(target, node, memory.version)
        for tensor in (target, output):
            self._track(tensor, node)
        return output

    def _out_of_place(self, func: Any, args: Any, kwargs: Any) -> fx.Node:
        target = args[0]
        if func is aten.copy_.default:
            source = self._node(args[1])
            if args[1].dtype != target.dtype:
                source = self.graph.call_function(aten._to_copy.default, (source,), {"dtype": target.dtype})
                describe(source, args[1].to(target.dtype))
            return self.graph.call_function(aten.expand.default, (source, list(target.shape)))
        if func in (aten.zero_.default, aten.fill_.Scalar):
            value = 0 if func is aten.zero_.default else args[1]
            return self._constant(torch.full_like(target, value))
        name, overload = func._schema.name.partition("::")[2].rstrip("_"), func._overloadname
        functional = getattr(getattr(aten, name, None), overload, None)
        if func.namespace != "aten" or functional is None or functional._schema.is_mutable:
            raise RecordError(f"{func} has no form that leaves its input alone")
        call = _mapped(self._node, (args, kwargs))
        return self.graph.call_function(functional, *call)

    def _whole(self, tensor: Tensor) -> fx.Node:
        """Return the node of all the memory behind a tensor, as a flat vector, before it is written."""
        if memory_key(tensor) not in self._memory:
            return self._constant(_flat(tensor).clone())
        return self._view(self._writer(tensor), _flat(tensor))

    def _writer(self, tensor: Tensor) -> _Value:
        """Return the latest value that covers all the memory behind a tensor."""
        memory = self._memory[memory_key(tensor)]
        if memory.writer is None:
            same = (v for v in self._values.values() if memory_key(v.tensor) == memory_key(tensor))
            memory.writer = next((v for v in same if _fills_memory(v.tensor)), None)
        if memory.writer is None:
            raise RecordError("a view of memory that no recorded tensor covers cannot be followed")
        return memory.writer

    def _view(self, writer: _Value, tensor: Tensor) -> fx.Node:
        """Return the node of a tensor that shares memory with a writer that covers that memory."""
        if tensor.is_conj() or tensor.is_neg():
            raise RecordError("a conjugated or negated view is read after its memory was written")
        if _geometry(writer.tensor) == _geometry(tensor):
            return writer.node
        flat = self.graph.call_function(aten.reshape.default, (writer.node, [-1]))
        describe(flat, writer.tensor.reshape(-1))
        if not writer.tensor.is_contiguous():
            order = torch.empty_like(_places(writer.tensor))
            order[_places(writer.tensor)] = torch.arange(len(order), device=order.device)
            flat = self.graph.call_function(aten.index_select.default, (flat, 0, self._constant(order)))
            describe(flat, _flat(writer.tensor))
        if writer.tensor.dtype != tensor.dtype:
            flat = self._reinterpreted(flat, writer.tensor, tensor)
        if tensor.ndim == 1 and tensor.is_contiguous() and tensor.numel() == _length(tensor):
            return flat
        picked = self.graph.call_function(aten.index_select.default, (flat, 0, self._constant(_places(tensor))))
        describe(picked, tensor.reshape(-1))
        return describe(self.graph.call_function(aten.reshape.default, (picked, list(tensor.shape))), tensor)

    def _reinterpreted(self, flat: fx.Node, written: Tensor, read: Tensor) -> fx.Node:
        """Read complex memory as pairs of real numbers, or the other way round."""
        if written.is_complex() and read.dtype is written.real.dtype:
            pairs = self.graph.call_function(aten.view_as_real.default, (flat,))
            describe(pairs, read.new_empty(_length(written), 2))
            return describe(self.graph.call_function(aten.reshape.default, (pairs, [-1])), _flat(read))
        if read.is_complex() and written.dtype is read.real.dtype:
            pairs = self.graph.call_function(aten.reshape.default, (flat, [-1, 2]))
            describe(pairs, written.new_empty(_length(read), 2))
            return describe(self.graph.call_function(aten.view_as_complex.default, (pairs,)), _flat(read))
        raise RecordError(f"memory is written as {written.dtype} and read as {read.dtype}")

    def _track(self, tensor: Tensor, node: fx.Node) -> None:
        describe(node, tensor)
        memory = self._memory.setdefault(memory_key(tensor), _Memory(0, None))
        self._values[id(tensor)] = _Value(tensor, node, memory.version)

    def _depends(self, tensor: Tensor) -> bool:
        return id(tensor) in self._values or memory_key(tensor) in self._memory

    def _node(self, tensor: Tensor) -> fx.Node:
        memory = self._memory.get(memory_key(tensor))
        if memory is None:
            return self._constant(tensor)
        value = self._values.get(id(tensor))
        if value is None or value.version != memory.version:
            value = _Value(tensor, self._view(self._writer(tensor), tensor), memory.version)
            self._values[id(tensor)] = value
        return value.node

    def _constant(self, tensor: Tensor) -> fx.Node:
        constant = self._constants.get(id(tensor))
        if constant is None:
            node = self.graph.get_attr(f"constant_{len(self._constants)}")
            constant = self._constants[id(tensor)] = _Constant(tensor, node)
            self._constants_in.setdefault(memory_key(tensor), []).append(constant)
        return constant.node

    def _keep_constants_of(self, tensor: Tensor) -> None:
        """Copy the constants that share memory with a tensor about to be written."""
        for constant in self._constants_in.pop(memory_key(tensor), ()):
            constant.copy = constant.value.clone()


def conjugated(x: Tensor) -> Tensor:
    """Return the conjugate in memory of its own, as `conj_physical` does, for which vmap has no rule."""
    result: Tensor = aten.resolve_conj.default(aten._conj.default(x))
    return result


_READS_VALUES = (aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default, aten.allclose.default)
_PLAIN = {  # what speaks of strides, or sets a bit that later copies clear, as the mathematical function it is
    aten.view.default: (aten.reshape.default, 2),
    aten._unsafe_view.default: (aten.reshape.default, 2),
    aten._reshape_alias.default: (aten.reshape.default, 2),
    aten._conj.default: (conjugated, 1),
    aten._conj_physical.default: (conjugated, 1),
    aten._neg_view.default: (aten.neg.default, 1),
}
_PRODUCTS = (aten.mm.default, aten.bmm.default, aten.convolution.default)
_ALIASES = (aten.detach.default, aten.alias.default, aten.lift_fresh.default)


def describe(node: fx.Node, tensor: Tensor) -> fx.Node:
    """Note on a node what its value looks like."""
    node.meta.setdefault("shape", tuple(tensor.shape))
    node.meta.setdefault("dtype", tensor.dtype)
    node.meta.setdefault("device", tensor.device)
    return node


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    if not func._schema.is_mutable:
        return []
    bound = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [tensor for name in names for tensor in _tensors(bound.get(name))]


def _mapped(function: Callable[[Tensor], Any], argument: Any) -> Any:
    """Return an operation's arguments with each tensor replaced. They nest no deeper than lists of tensors."""
    if isinstance(argument, Tensor):
        return function(argument)
    if isinstance(argument, (tuple, list)):
        return type(argument)([_mapped(function, part) for part in argument])
    if isinstance(argument, dict):
        return {key: _mapped(function, part) for key, part in argument.items()}
    return argument


def _tensors(argument: Any) -> list[Tensor]:
    """Return the tensors among an operation's arguments."""
    found: list[Tensor] = []
    _mapped(found.append, argument)
    return found


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype


def _length(tensor: Tensor) -> int:
    return int(tensor.untyped_storage().nbytes() // tensor.element_size())


def _fills_memory(tensor: Tensor) -> bool:
    """Tell whether a tensor covers its memory, each place once."""
    dense = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    expected = 1
    for stride, size in dense:
        if size > 1 and stride != expected:
            return False
        expected *= size
    return tensor.numel() == _length(tensor)


def _flat(tensor: Tensor) -> Tensor:
    return torch.as_strided(tensor.detach(), (_length(tensor),), (1,), 0)


def _places(tensor: Tensor) -> Tensor:
    """Return the positions of a tensor's entries in its memory."""
    places = torch.arange(_length(tensor), device=tensor.device)
    return torch.as_strided(places, tensor.shape, tensor.stride(), tensor.storage_offset()).reshape(-1)
