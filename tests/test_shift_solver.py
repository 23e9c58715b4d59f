"""The layer-wise solver: believed weights equal stored codes, invariances of the loop, and loss never made worse."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ir.errors import UsageError
from ir.ops.shiftcode import ShiftCodes, decode_offsets, decode_planes, decode_scales, encode
from passes.quantize.hessian import prepare
from passes.quantize.uniform import rtn
from passes.shiftcode import solver
from passes.shiftcode.bcq import Rounding, fit_bcq, row_window
from passes.shiftcode.solver import ShiftSpec, loss, metric_of, quadratic, relative_loss

LOOP = ShiftSpec(polish=0, sweeps=0, starts=1, ordered=False)


def solve(weight: Tensor, hessian: Tensor | None, spec: ShiftSpec) -> ShiftCodes:
    return solver.solve(weight, None if hessian is None else metric_of(hessian, spec), spec)


def problem(rows: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight and the Grams of 512 calibration and 512 held-out tokens with strongly correlated features."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    mix = draw(inputs, inputs) * torch.logspace(0, -1.2, inputs, dtype=torch.float64)[:, None]
    mix = mix * torch.exp2(draw(inputs))
    x, y = draw(512, inputs) @ mix, draw(512, inputs) @ mix
    return draw(rows, inputs) * 0.05, x.T @ x, y.T @ y


@settings(max_examples=12, deadline=None)
@given(
    rows=st.integers(1, 7),
    inputs=st.integers(3, 40),
    group=st.integers(2, 48),
    bits=st.integers(1, 3),
    terms=st.integers(1, 3),
    offset=st.booleans(),
    free=st.booleans(),
)
def test_codes_are_what_the_solver_believes(
    rows: int, inputs: int, group: int, bits: int, terms: int, offset: bool, free: bool
) -> None:
    w, h, _ = problem(rows, inputs, seed=inputs)
    w[0] *= 2.0**9
    seen: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def spy(planes: Tensor, alpha: Tensor, z: Tensor | None, g: int, t: int) -> ShiftCodes:
        seen.append((planes, alpha, z))
        return encode(planes, alpha, z, g, t)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("passes.shiftcode.solver.encode", spy)
        codes = solve(w, None if free else h, ShiftSpec(bits=bits, group=group, terms=terms, offset=offset))
    planes, alpha, z = seen[0]
    assert torch.equal(decode_scales(codes), alpha)
    assert torch.equal(decode_planes(codes) > 0, planes)
    assert (decode_offsets(codes) is None) == (z is None)
    if z is not None:
        assert torch.equal(decode_offsets(codes), z)  # type: ignore[arg-type]


def test_diagonal_hessian_is_a_weighted_fit_without_propagation() -> None:
    w, _, _ = problem(20, 40)
    diagonal = torch.logspace(0, 2, 40, dtype=torch.float64)
    codes = solve(w, torch.diag(diagonal), replace(LOOP, group=16, damp=0.0))
    rounding = Rounding(2, row_window(w, 2))
    parts = [
        fit_bcq(w[:, s : s + 16], 3, diagonal[s : s + 16], offset=True, rounding=rounding).values for s in (0, 16, 32)
    ]
    assert torch.equal(codes.dequantize(torch.float64), torch.cat(parts, 1))


def test_block_size_does_not_change_the_result() -> None:
    w, h, _ = problem(12, 44)
    for spec in (LOOP, ShiftSpec()):
        results = [solve(w, h, replace(spec, group=24, block=b)).dequantize(torch.float64) for b in (1, 7, 500)]
        for other in results[1:]:
            assert torch.equal(other, results[0])


@pytest.mark.parametrize("spec", [LOOP, ShiftSpec()])
def test_rows_do_not_see_each_other(spec: ShiftSpec) -> None:
    w, h, _ = problem(48, 40)
    spec = replace(spec, group=16)
    whole = solve(torch.cat([w, w[:13] * 100]), h, spec)
    alone = solve(w, h, spec)
    assert torch.equal(whole.signs[:, :48], alone.signs) and torch.equal(whole.scales[:48], alone.scales)


def test_power_of_two_scaling_of_weight_and_hessian_is_exact() -> None:
    w, h, _ = problem(10, 40)
    base = solve(w, h, ShiftSpec(group=16))
    moved = solve(w * 2.0**-11, h * 2.0**20, ShiftSpec(group=16))
    assert torch.equal(moved.dequantize(torch.float64), base.dequantize(torch.float64) * 2.0**-11)
    assert torch.equal(moved.signs, base.signs) and torch.equal(moved.scales, base.scales)


def test_the_loop_is_gptq() -> None:
    w, h, _ = problem(6, 24)
    prepared = prepare(h, 0.01)
    rounding = Rounding(2, row_window(w, 2))
    work, q = w.clone(), torch.zeros_like(w)
    for start in (0, 8, 16):
        weight = 1.0 / prepared.upper.diagonal()[start : start + 8] ** 2
        fit = fit_bcq(work[:, start : start + 8], 2, weight, offset=True, rounding=rounding)
        first, second = fit.alpha[:, 0], fit.alpha[:, 1]
        levels = fit.z[:, None] + torch.stack([-first - second, first - second, second - first, first + second], 1)
        for j in range(start, start + 8):
            pick = (work[:, j : j + 1] - levels).abs().argmin(1, keepdim=True)
            q[:, j] = levels.gather(1, pick)[:, 0]
            step = (work[:, j] - q[:, j]) / prepared.upper[j, j]
            work[:, j:] -= step[:, None] * prepared.upper[j, j:]
    got = solve(w, h, replace(LOOP, bits=2, group=8)).dequantize(torch.float64)
    torch.testing.assert_close(got, q, rtol=1e-12, atol=1e-15)


def test_each_stage_lowers_calibration_and_held_out_loss() -> None:
    w, h, held = problem(32, 96)
    free = solve(w, None, ShiftSpec(bits=2, group=32))
    stages = [LOOP, replace(LOOP, polish=2), replace(LOOP, polish=2, sweeps=1), replace(LOOP, polish=2, sweeps=3)]
    codes = [free, *(solve(w, h, replace(s, bits=2, group=32)) for s in stages)]
    for gram in (h, held):
        values = [loss(w, c, gram) for c in codes]
        assert values == sorted(values, reverse=True)
        assert values[-1] < 0.5 * values[0]
    assert loss(w, codes[-1], held) < 0.25 * relative_loss(w, rtn(w, 2, 32).dequantize(), held)


def test_sweeps_never_raise_any_row() -> None:
    w, h, _ = problem(30, 32, seed=5)
    damped = prepare(h, 0.01).matrix
    for terms in (1, 2):
        before = None
        for sweeps in range(4):
            spec = ShiftSpec(bits=2, group=16, terms=terms, sweeps=sweeps)
            now = quadratic(w - solve(w, h, spec).dequantize(torch.float64), damped)
            assert before is None or bool((now <= before * (1 + 1e-9)).all())
            before = now


def test_dead_inputs_and_degenerate_rows_stay_finite() -> None:
    w, h, _ = problem(6, 20)
    h[:, 4], h[4, :] = 0.0, 0.0
    w[0], w[1] = 0.0, 0.25
    w[2] = 0.0
    w[2, 3] = 1e4
    restored = solve(w, h, ShiftSpec(group=8)).dequantize()
    assert bool(torch.isfinite(restored).all()) and float(restored[0].abs().max()) == 0.0
    assert abs(float(restored[2, 3]) - 1e4) < 500


def test_data_free_solution_fits_groups_alone() -> None:
    w, _, _ = problem(12, 50)
    codes = solve(w, None, ShiftSpec(group=16, starts=3))
    rounding = Rounding(2, row_window(w, 2))
    tail = fit_bcq(w[:, 48:], 3, offset=True, rounding=rounding, starts=3, rounds=ShiftSpec().rounds)
    torch.testing.assert_close(codes.dequantize(torch.float64)[:, 48:], tail.values, rtol=1e-12, atol=1e-15)
    assert loss(w, codes, None) < 0.05


def test_solving_twice_gives_the_same_bytes() -> None:
    w, h, _ = problem(16, 40)
    one, two = solve(w, h, ShiftSpec(group=16)), solve(w, h, ShiftSpec(group=16))
    assert torch.equal(one.signs, two.signs) and torch.equal(one.scales, two.scales)


def test_misuse_is_refused() -> None:
    with pytest.raises(UsageError):
        ShiftSpec(terms=4)
    with pytest.raises(UsageError):
        solve(torch.full((2, 4), float("nan")), None, ShiftSpec())
    with pytest.raises(UsageError):
        solve(torch.ones(2, 4), torch.eye(5), ShiftSpec())
