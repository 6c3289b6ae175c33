"""LoRA-SB's frames: the leading singular vectors of the frozen weight that an adapter sits on.

As LoRA-XS takes them: K. Bałazy, M. Banaei, K. Aberer, J. Tabor. "LoRA-XS: Low-rank adaptation with extremely
small number of parameters". 2024, arXiv 2405.17604, §3. Here without the singular values, which would let a
few directions alone be learnt at a rate that suits all.

They are a function of the base, whose hash therefore stands for them. Computed in float64 and rounded to a
grid, they come out the same where another machine's linear algebra ends in other bits, but for a number that
lies between two of its points.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedtt.errors import ConfigError

__all__ = ["frames"]

_STEP = 2.0**-14  #: of the grid; entries are about d^-1/2
#: Least distance of neighbouring singular values, of the largest: float64 is out by 1e-15 over it at most.
_LEAST_GAP = 1e-7


def frames(module: nn.Module, rank: int) -> tuple[Tensor, Tensor]:
    """A (r, d_in) = V_rᵀ and B (d_out, r) = U_r of a layer's weight W (d_out, d_in) = U S Vᵀ.

    Computed at the first call for a rank, then kept as the layer's buffers, which no state dict holds. The
    largest number of each column of B is positive.
    Raises ConfigError where W has no r singular vectors, or where they are not unique.
    """
    names = (f"frame_a_{rank}", f"frame_b_{rank}")
    if not hasattr(module, names[0]):
        weight = module.get_parameter("weight")
        for name, frame in zip(names, _singular_vectors(weight.detach(), rank), strict=True):
            module.register_buffer(name, frame.to(weight), persistent=False)
    a, b = (module.get_buffer(name) for name in names)
    return a, b


def _singular_vectors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    left, values, right = torch.linalg.svd(weight.to("cpu", torch.float64), full_matrices=False)
    if rank > len(values):
        raise ConfigError("adapter.rank", rank, f"a whole number from 1 to {len(values)}")
    gaps = values[:rank] - torch.cat([values, values.new_zeros(1)])[1 : rank + 1]
    if not bool((gaps > _LEAST_GAP * values[0]).all()):
        unique = int((gaps > _LEAST_GAP * values[0]).int().cumprod(0).sum())
        raise ConfigError(
            "adapter.rank", rank, f"at most {unique}, as a frozen weight has equal singular values from there"
        )
    left, right = left[:, :rank], right[:rank]
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))
    a, b = right * largest.sign().T, left * largest.sign()
    return _rounded(a), _rounded(b)


def _rounded(frame: Tensor) -> Tensor:
    return (torch.round(frame / _STEP) * _STEP).to(torch.float32).contiguous()
