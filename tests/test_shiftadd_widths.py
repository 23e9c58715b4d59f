"""Widths site by site in `shiftadd`, and the trials by which they are chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ir.analysis import linear_sites
from ir.program import Program
from passes.base import Context
from passes.quantize.hessian import Gram, empty_gram, update
from passes.quantize.salience import row_energy
from passes.shiftadd import ShiftAdd, _rotated
from passes.widths import put_widths
from tests.coded_sites import coded, decoded, parts, same_parts, stored_bytes
from tests.shiftadd_runs import DATA, QUICK, SITES, compress, figures_of
from tests.watch import values


def test_each_site_gets_the_width_chosen_for_it(tiny_model: Program) -> None:
    chosen = {SITES[0]: 3, SITES[1]: 1, SITES[5]: 4, SITES[9]: 3}
    program = tiny_model.clone()
    put_widths(program, chosen)
    rows = figures_of(ShiftAdd(bits=2, group=16).plan(program))
    found, _ = compress(program)
    for name, node in coded(found).items():
        assert parts(found, node)[0].shape[0] == chosen.get(name, 2)  # type: ignore[union-attr]
        assert rows[name]["bytes"] == stored_bytes(found, node)
    for name, bits in ((SITES[0], 3), (SITES[1], 1), (SITES[2], 2)):
        assert same_parts(found, compress(tiny_model, bits=bits)[0], name)
    trits, _ = compress(program, code="trits", bits=2, **QUICK, calib="none")
    assert {parts(trits, n)[0].shape[0] for n in coded(trits).values()} == {2}  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [{}, {"mode": "lat", "group": 24}, {"mode": "acc", "group": 7}, {"terms": 0}])
@pytest.mark.parametrize("data", [False, True])
def test_trials_are_the_losses_and_bytes_of_real_codes(
    tiny_model: Program, options: dict[str, Any], data: bool
) -> None:
    quickly = {"rounds": 5, "starts": 1, "iterations": 0, "polish": 0, "sweeps": 0, "basis": "plain", "target": "own"}
    site = next(s for s in linear_sites(tiny_model, tiny_model.graph.nodes)[0] if s.name == SITES[0])
    weight = tiny_model.params.get(site.weight).double()
    gram = None
    if data:
        gram = empty_gram(site.inputs)
        for ids in DATA:
            update(gram, values(tiny_model, ids)[site.node.args[0].name])  # type: ignore[union-attr]
    coder = ShiftAdd(**{"group": 16, "basis": "plain", **options})
    found = coder.trial(weight, gram, (1, 2, 4), site, Context())
    assert [t.bits for t in found] == [1, 2, 4]
    losses = [float(t.row_loss.sum()) for t in found]
    assert losses[1] < 0.6 * losses[0] and losses[2] < 0.6 * losses[1]
    for trial in found:
        others = tuple(s for s in SITES if s != site.name)
        calib = "stream" if data else "none"
        run, _ = compress(tiny_model, bits=trial.bits, **{**quickly, **options}, skip=others, calib=calib)
        node = coded(run)[site.name]
        assert trial.stored_bytes == stored_bytes(run, node) == coder.stored_bytes(site, trial.bits)
        expected = row_energy(weight - decoded(run, node), gram)
        torch.testing.assert_close(trial.row_loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("data", [False, True])
def test_trials_of_rotated_weights_are_in_the_basis_of_the_codes(tiny_model: Program, data: bool) -> None:
    site = next(s for s in linear_sites(tiny_model, tiny_model.graph.nodes)[0] if s.name == SITES[0])
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(site.rows, site.inputs, generator=generator, dtype=torch.float64)
    weight[:, 3] *= 40  # one column governs the scales of its group, unless rotation spreads it
    x = torch.randn(300, site.inputs, generator=generator, dtype=torch.float64)
    gram = Gram(x.T @ x, 300) if data else None
    turned, metric = _rotated(weight, gram, seed=1)
    torch.testing.assert_close(row_energy(turned, metric), row_energy(weight, gram), rtol=1e-10, atol=0)
    assert float(turned.abs().max()) < 0.5 * float(weight.abs().max())
    plain, spread = (
        float(ShiftAdd(group=16, basis=basis).trial(weight, gram, (3,), site, Context())[0].row_loss.sum())  # type: ignore[arg-type]
        for basis in ("plain", "rotated")
    )
    assert spread < 0.8 * plain
