"""Binarised weights: salient inputs apart, and the bell of the others in one or two planes of signs (BiLLM)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ir.ops.shiftcode import ShiftCodes, encode
from passes.quantize.hessian import PreparedHessian, prepare
from passes.quantize.order import Span
from passes.quantize.planes import fitted_scales, residual_signs, signed
from passes.quantize.sweep import Laid, sweep

# Counts of salient inputs that are tried, in equal steps up to the largest.
_TRIED = 6
# What such counts are multiples of: as many inputs as kernels take at once, or where so many are not salient, fewer.
_UNIT, _FEW = 32, 8
_MOST = 65504.0


@dataclass(frozen=True)
class BellSpec:
    """How inputs are split and binarised.

    group: inputs that share scales and an offset in a row; share: of all inputs that may be salient; rest: planes of
    the others, 2 for the two sets around the middle of their bell that the paper splits them into, 1 for signs alone;
    salient: planes of salient ones; damp: of the Hessian, relative to its mean diagonal.
    """

    group: int
    share: float
    rest: int
    salient: int = 2
    damp: float = 0.01


@dataclass(frozen=True, eq=False)
class Binarised:
    """A weight in two parts: i64 [s] and [K - s] say which inputs each has, in order."""

    salient: Tensor
    rest: Tensor
    codes: tuple[ShiftCodes, ShiftCodes]

    def dequantize(self) -> Tensor:
        """Return the weight [N, K], float64."""
        first, second = (codes.dequantize(torch.float64) for codes in self.codes)
        found = first.new_empty(first.shape[0], len(self.salient) + len(self.rest))
        found[:, self.salient], found[:, self.rest] = first, second
        return found


def salient_inputs(weights: Sequence[Tensor], hessian: Tensor | None, spec: BellSpec) -> Tensor:
    """Return which inputs of weights that read the same value are salient, sorted, i64 [s].

    Inputs are ranked by the sum of W^2 / diag(U)^2 over all rows (BiLLM, 2402.04291, section 3.2), U the Cholesky
    factor of the inverse Hessian; as many are taken as leave the least error when all are binarised and none makes up
    for another. hessian: [K, K], None for one that tells nothing.
    """
    inputs = weights[0].shape[1]
    strength = _prepared(hessian, inputs, spec.damp).upper.diagonal().square().reciprocal()
    ranked = torch.argsort(sum(w.square().sum(0) for w in weights) * strength, descending=True, stable=True)
    best, least = ranked[:0], float("inf")
    for count in _counts(inputs, spec.share):
        chosen, others = ranked[:count].sort().values, ranked[count:].sort().values
        parts = ((w[:, at], planes, strength[at]) for w in weights for at, planes in _split(chosen, others, spec))
        error = sum(_alone(part, planes, own, spec.group) for part, planes, own in parts)
        if error < least:
            best, least = chosen, error
    return best


def binarised(weight: Tensor, hessian: Tensor | None, salient: Tensor, spec: BellSpec) -> Binarised:
    """Return a weight [N, K] in planes of signs, salient inputs first, each input's error made up for by those after.

    hessian: as for `salient_inputs`; raises UnsupportedError as `passes.quantize.hessian.prepare`. Source: BiLLM
    (2402.04291, Algorithm 1), with the sweep inside a group too, and levels by least squares for each row.
    """
    others = torch.ones(weight.shape[1], dtype=torch.bool)
    others[salient] = False
    rest, parts = others.nonzero()[:, 0], list[tuple[Span, int]]()
    order = torch.cat([salient, rest])
    for start, end, planes in ((0, len(salient), spec.salient), (len(salient), len(order), spec.rest)):
        parts += [(Span(0, s, min(s + spec.group, end)), planes) for s in range(start, end, spec.group)]
    matrix = torch.eye(len(order), dtype=torch.float64) if hessian is None else hessian
    prepared = prepare(matrix[order][:, order], spec.damp)
    laid = dict[int, _Levels]()

    def lay(span: Span, part: Tensor) -> Laid:
        planes = next(p for own, p in parts if own is span)
        strength = prepared.upper.diagonal()[span.start : span.end].square().reciprocal()
        laid[span.start] = _Levels(part.T, planes, strength)
        return laid[span.start]

    sweep(weight.T[order].double().clone(), prepared, tuple(span for span, _ in parts), lay)
    first, second = (
        _encoded([laid[span.start] for span, _ in parts if (span.start < len(salient)) == salient_part], spec.group)
        for salient_part in (True, False)
    )
    return Binarised(salient, rest, (first, second))


class _Levels:
    """The levels of a group of inputs, z + sum_i +-a_i for each row, and the signs of those laid so far."""

    def __init__(self, part: Tensor, planes: int, strength: Tensor) -> None:
        self.offset, self.scales = _fitted(part, planes, strength)
        self.signs: list[Tensor] = []

    def __call__(self, j: int, column: Tensor) -> Tensor:
        """Return the nearest level of each row, [N], by the planes of what is left."""
        del j
        signs = residual_signs((column - self.offset)[:, None, None], self.scales[:, None])
        self.signs.append(torch.stack([s[:, 0, 0] for s in signs]))
        return _level(signs, self.offset, self.scales)


def _level(signs: Sequence[Tensor], offset: Tensor, scales: Tensor) -> Tensor:
    total = offset.clone()
    for sign, scale in zip(signs, scales.unbind(-1), strict=True):
        total += signed(sign[:, 0], scale)[:, 0]
    return total


def _fitted(part: Tensor, planes: int, strength: Tensor) -> tuple[Tensor, Tensor]:
    """Return offsets [N] and scales [N, planes] of a group's weights [N, n], as float16 holds them, in float64."""
    offset = ((part * strength).sum(1) / strength.sum()).clamp(-_MOST, _MOST).half().double()
    scales = fitted_scales((part - offset[:, None])[:, None], planes, strength[None])
    return offset, scales[:, 0].half().double()


def _alone(part: Tensor, planes: int, strength: Tensor, group: int) -> float:
    """Return the error of a part [N, K] that is binarised by groups without making up for anything."""
    total = 0.0
    for start in range(0, part.shape[1], group):
        own, weight = part[:, start : start + group], strength[start : start + group]
        offset, scales = _fitted(own, planes, weight)
        left = own - offset[:, None]
        for sign, scale in zip(residual_signs(left[:, None], scales[:, None]), scales.unbind(-1), strict=True):
            left = left - signed(sign[:, 0], scale)
        total += float((left.square() * weight).sum())
    return total


def _encoded(groups: Sequence[_Levels], group: int) -> ShiftCodes:
    signs = torch.cat([torch.stack(one.signs, -1) for one in groups], -1)
    scales, offsets = torch.stack([one.scales for one in groups], 1), torch.stack([one.offset for one in groups], 1)
    return encode(signs, scales, offsets, min(group, signs.shape[-1]), 0)


def _split(chosen: Tensor, others: Tensor, spec: BellSpec) -> Iterator[tuple[Tensor, int]]:
    yield chosen, spec.salient
    yield others, spec.rest


def _counts(inputs: int, share: float) -> list[int]:
    """Return the counts of salient inputs to try; at least one unit, and less than all."""
    unit = _UNIT if share * inputs >= _UNIT else _FEW
    most = max(unit, int(share * inputs) // unit * unit)
    step = max(unit, most // _TRIED // unit * unit)
    return [n for n in range(step, most + 1, step) if n < inputs] or [max(1, inputs // 2)]


def _prepared(hessian: Tensor | None, inputs: int, damp: float) -> PreparedHessian:
    return prepare(torch.eye(inputs, dtype=torch.float64) if hessian is None else hessian, damp)
