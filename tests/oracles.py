"""How far a result may be from the truth, derived: from float64, the dtypes' own eps, the length of sums, or from the
error that eager mode makes.

Errors are first-order bounds of the worst case. Those of sums are relative to the sum of the absolute values of what is
added up (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2), as sums may cancel. Nothing here knows
the code under test.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

F32, F64 = torch.float32, torch.float64


# -- relative errors ---------------------------------------------------------------------------------------------------


def of_sum(terms: int, *, beside: int = 2, dtype: torch.dtype = F32) -> float:
    """A sum of ``terms`` products in any order, each operation rounded to ``dtype``.

    Args:
        beside: roundings before or after the sum: a scale, a bias, an exponential.
    """
    return (terms + beside) * torch.finfo(dtype).eps


def of_rounding(*dtypes: torch.dtype, times: int = 1) -> float:
    """A value that is rounded to each of the dtypes, ``times`` times.

    A rounding to nearest errs by half of eps; it is taken whole, as a value that already errs may go to the farther of
    its two neighbours.
    """
    return times * sum(torch.finfo(dtype).eps for dtype in dtypes)


def smallest(dtype: torch.dtype) -> float:
    """The smallest number above 0: what results close to 0 are rounded by, whatever their size."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


# -- the truth ---------------------------------------------------------------------------------------------------------


class Exact(NamedTuple):
    """What sums come to in float64, and the sums of the absolute values of their terms."""

    value: Tensor
    magnitude: Tensor


def product(a: Tensor, b: Tensor, plus: Tensor | None = None) -> Exact:
    """``a @ b + plus``."""
    a, b = a.detach().double(), b.detach().double()
    shift = torch.zeros((), dtype=F64, device=a.device) if plus is None else plus.detach().double()
    return Exact(a @ b + shift, a.abs() @ b.abs() + shift.abs())


def total(a: Tensor, dim: int = 0) -> Exact:
    """The sum along a dimension."""
    a = a.detach().double()
    return Exact(a.sum(dim), a.abs().sum(dim))


def block_sums(a: Tensor, block: int) -> Tensor:
    """The sum over each block of a matrix, those cut at its edges included."""

    def of_block(length: int) -> Tensor:
        return (torch.arange(-(-length // block))[:, None] == torch.arange(length) // block).double()

    return of_block(a.shape[0]) @ a.detach().double() @ of_block(a.shape[1]).t()


# -- comparisons -------------------------------------------------------------------------------------------------------


def assert_within(got: Tensor, exact: Tensor, allowed: Tensor, what: str = "result") -> None:
    """Each element is as near to the float64 truth as is allowed.

    Results below float32's normal numbers may be flushed to 0; equal infinities are equal, a NaN is never right.
    """
    assert got.shape == exact.shape, what
    error = (got.double() - exact).abs().masked_fill(got.double() == exact, 0)
    wrong = ~(error <= allowed + torch.finfo(F32).tiny)
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} elements beyond the bound, off by up to {error[wrong].max():.2e}, "
        f"allowed {allowed.expand_as(error)[wrong].min():.2e}"
    )


def assert_as_good_as(
    got: Tensor, usual: Tensor, exact: Tensor, dtype: torch.dtype, what: str = "result", size: float | None = None
) -> None:
    """A result is as near to the float64 truth as the usual way to compute it is, up to a few roundings of ``dtype``.

    The error of the usual way, measured, says how the problem's condition amplifies roundings; the factor of four is
    for sums that run in another order. The floor is for results that the usual way happens to get exactly right.

    Args:
        size: of what the floor's roundings are of, where it is known to be more than the result: the sum of the
            absolute terms of a sum that cancels.
    """
    assert got.dtype == usual.dtype, what
    assert got.shape == usual.shape == exact.shape, what
    if exact.numel():
        error, common = ((t.double() - exact).abs().max().item() for t in (got, usual))
        floor = 8 * of_rounding(dtype) * max(exact.abs().max().item(), size or 0.0) + torch.finfo(dtype).tiny
        allowed = 4 * common + floor
        assert error <= allowed, f"{what}: error {error:.2e}, the usual way's {common:.2e}, allowed {allowed:.2e}"


def assert_all_as_good_as(
    got: Mapping[str, Tensor],
    usual: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    dtype: torch.dtype,
    sizes: Mapping[str, float] = {},
) -> None:
    """`assert_as_good_as` of results by name, with the ``sizes`` that are known."""
    assert got.keys() == usual.keys() == exact.keys()
    for name, right in exact.items():
        assert_as_good_as(got[name], usual[name], right, dtype, name, sizes.get(name))


def assert_reordered(
    got: Tensor, want: Tensor, terms: int, *, size: float | None = None, dtype: torch.dtype | None = None
) -> None:
    """Two results of one arithmetic, with sums of ``terms`` terms in another order.

    Args:
        size: that of the numbers added up; the largest result's if not said, and at least 1e-3.
        dtype: what is rounded to after each operation; the result's dtype if not said.
    """
    if size is None:
        size = max(float(want.detach().abs().max()), 1e-3)
    torch.testing.assert_close(got, want, rtol=0, atol=of_sum(terms, beside=0, dtype=dtype or want.dtype) * size)


def assert_same_course(got: Tensor, want: Tensor, parted: int) -> None:
    """Two runs of one training that differ in roundings alone, as by the order of sums.

    How far training drives them apart is not derived but stated: by ``parted`` roundings at the size of the largest
    element. SGD passes an error on, Adam divides it by gradients that may be small.
    """
    size = float(want.detach().abs().max())
    torch.testing.assert_close(got, want, rtol=0, atol=of_rounding(want.dtype, times=parted) * size)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Bit for bit, zeros with their sign, any NaN for any NaN."""
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    nan = want.isnan() if want.is_floating_point() else torch.zeros_like(want, dtype=torch.bool)
    assert torch.equal(got[~nan].signbit(), want[~nan].signbit())
