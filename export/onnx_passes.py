"""What ONNX Runtime would compute in more passes over large tensors than it needs, written otherwise."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RewriteRule, RewriteRuleSet

__all__ = ["simplify"]

_ROOT_HALF, _HALF = math.sqrt(0.5), 0.5
_DENSITY = 1 / math.sqrt(2 * math.pi)  #: φ(0) of a normal distribution


def simplify(model: ir.Model) -> None:
    """Apply each rule wherever it fits; a graph that torch writes otherwise stays as it is, and is slower."""
    _RULES.apply_to_model(model)
    _RESHAPES.apply_to_model(model)


def _gelu_slope(op: Any, x: Any) -> Any:
    """gelu'(x) = Φ(x) + x φ(x), as torch decomposes it."""
    above = op.Mul(op.Add(op.Erf(op.Mul(x, _ROOT_HALF)), op.Cast(1)), _HALF)
    density = op.Mul(op.Exp(op.Mul(op.Mul(x, x), -_HALF)), _DENSITY)
    return op.Add(above, op.Mul(x, density))


def _gelu_slope_of_root(op: Any, x: Any) -> Any:
    """With z = x / √2 it is ½ erf(z) + ½ + z / exp(z²) / √π, and the first three are one operator.

    Where z² is too large for exp, 1 / ∞ is what it should be. HardSigmoid cuts at 0 and 1, as Φ does.
    """
    z = op.Mul(x, _constant(op, _ROOT_HALF))
    above = op.HardSigmoid(op.Erf(z), alpha=_HALF, beta=_HALF)
    return op.Add(above, op.Mul(op.Div(z, op.Exp(op.Mul(z, z))), _constant(op, 1 / math.sqrt(math.pi))))


def _scaled_scores(op: Any, a: Any, b: Any, shape: Any, scale: Any) -> Any:
    """Attention's scores."""
    return op.Mul(op.Reshape(op.MatMul(a, b), shape, _outputs=["scores"]), scale)


def _scores(op: Any, a: Any, b: Any, shape: Any, scale: Any, **_: Any) -> Any:
    """Scaled beside the product, of which ONNX Runtime makes one operator."""
    return op.Reshape(op.Mul(op.MatMul(a, b), scale), shape, allowzero=1)


def _scaled_softmax_gradient(op: Any, a: Any, b: Any, shape: Any, p: Any, axes: Any, scale: Any) -> Any:
    """scale (g p - p Σ g p), g = a b, as torch decomposes it."""
    weighted = op.Mul(op.Reshape(op.MatMul(a, b), shape, _outputs=["scores"]), p)
    return op.Mul(op.Sub(weighted, op.Mul(p, op.ReduceSum(weighted, axes))), scale)


def _softmax_gradient(op: Any, a: Any, b: Any, shape: Any, p: Any, axes: Any, scale: Any, **_: Any) -> Any:
    """(h - Σ h p) p, h = scale a b: scaled beside the product, too, and without g p kept."""
    h = _scores(op, a, b, shape, scale)
    return op.Mul(op.Sub(h, op.ReduceSum(op.Mul(h, p), axes, keepdims=1)), p)


def _narrow_product(op: Any, a: Any, b: Any) -> Any:
    """A gradient of an adapter's thin matrix; the transposition of A goes into the product."""
    return op.MatMul(op.Transpose(a, perm=[1, 0]), b)


def _wide_product(op: Any, a: Any, b: Any) -> Any:
    """Aᵀ B as (Bᵀ A)ᵀ, where it is the narrower that is turned."""
    return op.Transpose(op.MatMul(op.Transpose(b, perm=[1, 0]), a), perm=[1, 0])


def _is_wider(_context: Any, a: ir.Value, b: ir.Value, **_: Any) -> bool:
    width, other = (value.shape[-1] if value.shape else None for value in (a, b))
    return isinstance(width, int) and isinstance(other, int) and width > other


def _turned_back(op: Any, x: Any) -> Any:
    return op.Transpose(op.Transpose(x, perm=[1, 0]), perm=[1, 0])


def _unturned(op: Any, x: Any) -> Any:
    return op.Identity(x)


def _by_turned(op: Any, a: Any, w: Any, b: Any) -> Any:
    return op.Gemm(a, op.Transpose(w, perm=[1, 0]), b, alpha=1.0, beta=1.0, transA=0, transB=0)


def _by_frozen(op: Any, a: Any, w: Any, b: Any) -> Any:
    """Without a turned W: ONNX Runtime makes one in each run where there are several uses, all at first."""
    return op.Gemm(a, w, b, transB=1)


def _is_frozen(_context: Any, w: ir.Value, **_: Any) -> bool:
    return w.is_initializer()


def _twice(op: Any, x: Any, first: Any, shape: Any) -> Any:
    return op.Reshape(op.Reshape(x, first), shape, allowzero=1, _outputs=["reshaped"])


def _once(op: Any, x: Any, first: Any, shape: Any, reshaped: ir.Value) -> Any:
    """One reshape, or none."""
    return op.Identity(x) if _are_alike(x, reshaped) else op.Reshape(x, shape, allowzero=1)


def _added(op: Any, a: Any, b: Any, shape: Any, x: Any) -> Any:
    return op.Add(x, op.Reshape(op.MatMul(a, b), shape, _outputs=["product"]))


def _adding(op: Any, a: Any, b: Any, shape: Any, x: Any, **_: Any) -> Any:
    """A product that begins from what it is added to."""
    width = op.Constant(value=ir.tensor([-1, b.shape[1]], dtype=ir.DataType.INT64))
    return op.Reshape(op.Gemm(a, b, op.Reshape(x, width)), shape, allowzero=1)


def _is_flat(_context: Any, a: ir.Value, b: ir.Value, x: ir.Value, product: ir.Value, **_: Any) -> bool:
    flat = all(value.shape is not None and len(value.shape) == 2 for value in (a, b))
    return flat and isinstance(b.shape[1], int) and _are_alike(x, product)  # type: ignore[index]


def _are_alike(x: ir.Value, y: ir.Value) -> bool:
    """Whether they surely have one shape."""
    known = x.shape is not None and not x.shape.has_unknown_dim()
    return known and x.shape == y.shape


def _is_number(_context: Any, scale: ir.Value, **_: Any) -> bool:
    value = ir.convenience.get_const_tensor(scale)
    return value is not None and value.size == 1


def _constant(op: Any, value: float) -> ir.Value:
    found: ir.Value = op.Constant(value=ir.tensor(value, dtype=ir.DataType.FLOAT))
    return found


#: Nodes with other uses stay, and those without go at the end.
_RULES = RewriteRuleSet(
    [
        RewriteRule(_gelu_slope, _gelu_slope_of_root, remove_nodes=False),
        RewriteRule(_scaled_softmax_gradient, _softmax_gradient, _is_number, remove_nodes=False),
        RewriteRule(_added, _adding, _is_flat, remove_nodes=False),
        RewriteRule(_narrow_product, _wide_product, _is_wider, remove_nodes=False),
        RewriteRule(_scaled_scores, _scores, _is_number, remove_nodes=False),
        RewriteRule(_turned_back, _unturned, remove_nodes=False),
        RewriteRule(_by_turned, _by_frozen, _is_frozen, remove_nodes=False),
    ]
)
_RESHAPES = RewriteRuleSet([RewriteRule(_twice, _once, remove_nodes=False)])
