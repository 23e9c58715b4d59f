"""`nomul::hadamard`: random signs and a Hadamard transform, a rotation made of additions alone."""

from __future__ import annotations

from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from ir.errors import UsageError
from ir.ops.cost import Cost
from ir.ops.packing import unpack_bits
from ir.products import products_in

# A dense factor of order n costs n - 1 additions a channel; larger ones would approach the linears they serve.
_LARGEST_FACTOR = 256
# Values turned at a time: 2 MiB in float64 stay in a core's cache through all factors.
_AT_ONCE = 1 << 18
# Channels turned by one dense product of +-1: more arithmetic than butterflies, and several times faster.
_AT_A_TIME = 64
_TWO = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)


@lru_cache(maxsize=256)
def hadamard_orders(width: int) -> tuple[int, ...]:
    """Return the orders, ascending, of the Hadamard matrices whose Kronecker product rotates blocks of `width`.

    Their product is the largest divisor of `width` that is a product of 2 (Sylvester) and orders of Paley's two
    constructions (q + 1 and 2 (q + 1) for primes q) up to 256; of the ways to write it, the one with fewest additions.
    Empty where only order 1 is left, as for odd widths. Raises UsageError for a width below 1.
    """
    if width < 1:
        raise UsageError("only a positive number of channels can be rotated", why=f"{width} were given")
    for order in range(width, 1, -1):
        if width % order == 0 and (factors := _factors(order)) is not None:
            return factors
    return ()


def block_order(width: int) -> int:
    """Return the order of the blocks in which `width` channels are rotated, 1 where there is no rotation."""
    return prod(hadamard_orders(width))


@lru_cache(maxsize=4096)
def _factors(order: int) -> tuple[int, ...] | None:
    """Return the cheapest factorisation of an order into orders of known matrices, or None where there is none."""
    if order == 1:
        return ()
    found = []
    for first in (2, *range(12, min(order, _LARGEST_FACTOR) + 1, 4)):
        if order % first == 0 and _prime_of(first) and (rest := _factors(order // first)) is not None:
            found.append(tuple(sorted((first, *rest))))
    return min(found, key=lambda f: (_additions(f), f), default=None)


def _additions(factors: tuple[int, ...]) -> int:
    """Return the additions a channel takes."""
    return sum(f - 1 for f in factors)


def _prime_of(order: int) -> int:
    """Return the prime that Paley's construction of a matrix of this order starts from (1 for order 2), 0 for none."""
    if order == 2:
        return 1
    q, half = order - 1, order // 2 - 1
    if q % 4 == 3 and _is_prime(q):
        return q
    return half if half % 4 == 1 and _is_prime(half) else 0


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


@lru_cache(maxsize=64)
def _factor_matrix(order: int) -> Tensor:
    """Return the Hadamard matrix int8 [order, order] of order 2 or of Paley's constructions.

    With chi the quadratic character of q: I + S with a skew S for q = 3 mod 4, and for q = 1 mod 4 a symmetric S of
    order q + 1 with every 0 and +-1 replaced by a 2 x 2 matrix (Paley 1933, J. Math. Phys. 12).
    """
    q = _prime_of(order)
    if q == 1:
        return _TWO
    squares = {x * x % q for x in range(1, q)}
    chi = torch.tensor([0] + [1 if x in squares else -1 for x in range(1, q)], dtype=torch.int8)
    place = torch.arange(q)
    core = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    core[0, 1:], core[1:, 0] = 1, 1 if q % 4 == 1 else -1
    core[1:, 1:] = chi[(place[:, None] - place) % q]
    one = torch.eye(q + 1, dtype=torch.int8)
    if q % 4 == 3:
        return one + core
    return torch.kron(core, _TWO) + torch.kron(one, torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8))


def hadamard_matrix(order: int) -> Tensor:
    """Return the matrix H that `nomul::hadamard` applies, int8 [order, order] of +-1 with H^T H = order I.

    Raises UsageError for an order that no construction gives.
    """
    matrix = torch.ones(1, 1, dtype=torch.int8)
    for factor in _known(order):
        matrix = torch.kron(matrix, _factor_matrix(factor))
    return matrix


def _known(order: int) -> tuple[int, ...]:
    factors = hadamard_orders(order)
    if prod(factors) != order:
        raise UsageError(
            f"there is no Hadamard matrix of order {order} here",
            why="it is no product of 2 and of Paley orders up to 256",
            fix=f"use blocks of {prod(factors)}",
        )
    return factors


@lru_cache(maxsize=64)
def hadamard_factors(order: int, most: int = _AT_A_TIME) -> tuple[Tensor, ...]:
    """Return int8 matrices whose Kronecker product is H, neighbouring factors as one up to `most` channels."""
    matrices: list[Tensor] = []
    for factor in reversed(_known(order)):
        matrix = _factor_matrix(factor)
        if matrices and matrices[0].shape[0] * factor <= most:
            matrices[0] = torch.kron(matrix, matrices[0])
        else:
            matrices.insert(0, matrix)
    return tuple(matrices)


def _transform(x: Tensor, order: int, transposed: bool) -> Tensor:
    """Return H x (or H^T x) for every block of `order` channels of x [rows, K], one Kronecker factor after another.

    A factor turns an axis of what precedes it, its own channels and what follows: no values have to change places.
    """
    turned, after = x, 1
    for matrix in reversed(hadamard_factors(order)):
        size = matrix.shape[0]
        factor = (matrix.T if transposed else matrix).to(x)
        turned = turned.reshape(-1, size) @ factor.T if after == 1 else factor @ turned.view(-1, size, after)
        after *= size
    return turned.reshape(x.shape)


def _turned(x: Tensor, keep: Tensor, order: int, transposed: bool) -> Tensor:
    """Return H D x or D H^T x for rows x [rows, K]; keep: bool [K], false where D is -1."""
    wide = x if x.dtype == torch.float64 else x.float()
    diagonal = torch.where(keep, 1, -1).to(wide)
    if transposed:
        return _transform(wide, order, transposed) * diagonal
    return _transform(wide * diagonal, order, transposed)


@torch.library.custom_op("nomul::hadamard", mutates_args=())
def hadamard(x: Tensor, signs: Tensor, order: int, transposed: bool = False) -> Tensor:
    """Return H D x per block of `order` channels, or its transpose D H^T x; both together multiply by `order`.

    x: float [..., K] with K a multiple of `order`; signs: uint8 [ceil(K/8)], the diagonal D as bits, 1 is +1; H: the
    matrix of `hadamard_matrix(order)`, entries +-1, not normalised, so that only additions and sign changes are needed.
    Summed in float32 at least, and returned in x's dtype. Raises UsageError for an unknown order or one that does not
    divide K. Source: incoherence by random rotations, QuIP# (2402.04396, section 3), with Paley factors in place of
    look-up tables.
    """
    width = x.shape[-1]
    if order < 1 or width % order:
        raise UsageError(f"blocks of {order} do not divide {width} channels", where="nomul::hadamard")
    keep = unpack_bits(signs, 1, width).bool()
    rows, out = x.reshape(-1, width), torch.empty_like(x, memory_format=torch.contiguous_format)
    parts = max(1, _AT_ONCE // width)
    # Sums of rounded terms would not be this rotation, whatever precision other products are taken in.
    with products_in("float32"):
        for part, into in zip(rows.split(parts), out.view(-1, width).split(parts), strict=True):
            into.copy_(_turned(part, keep, order, transposed))
    return out


@hadamard.register_fake
def _(x: Tensor, signs: Tensor, order: int, transposed: bool = False) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, signs, ctx.order, ctx.transposed = inputs
    ctx.save_for_backward(signs)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    """The map is linear in x, and its transpose is the operator's other form."""
    (signs,) = ctx.saved_tensors
    return hadamard(grad, signs, ctx.order, not ctx.transposed), None, None, None


hadamard.register_autograd(_backward, setup_context=_save)


def hadamard_cost(width: int, order: int, tokens: int, element: int = 4) -> Cost:
    """Return the cost of one call over `tokens` tokens of `width` channels: f - 1 additions a channel and factor f.

    A factor of 2 is a butterfly, a Paley factor a dense matrix of +-1; signs turn additions into subtractions.
    """
    moved = -(-width // 8) + 2 * tokens * width * element
    return Cost(moved, 0, tokens * width * _additions(_known(order)))
