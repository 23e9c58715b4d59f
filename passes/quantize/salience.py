"""How much a coding error at a site matters: energies of errors, and what makes those of different sites comparable."""

from __future__ import annotations

from torch import Tensor

from passes.quantize.hessian import Gram, prepare


def row_energy(matrix: Tensor, gram: Gram | None) -> Tensor:
    """Return diag(M H M^T) of a matrix M [N, K], float64 [N]: its output's energy over all tokens of a Gram matrix.

    gram: None for the identity, which leaves the squared norm of each row.
    """
    m = matrix.double()
    energy = m.square().sum(1) if gram is None else ((m @ gram.matrix.double()) * m).sum(1)
    # A Gram matrix added up in float32 can be negative along what it hardly saw.
    return energy.clamp_min(0.0)


def relative_loss(row_loss: Tensor, row_output: Tensor) -> float:
    """Return the energy of a site's output error relative to its output's, 0 for an output of zeros."""
    energy = float(row_output.sum())
    return float(row_loss.sum()) / energy if energy > 0 else 0.0


def weighted_loss(row_loss: Tensor, row_output: Tensor, weights: int) -> float:
    """Return a site's relative loss times its number of weights.

    Widths then go to where they buy most relative error per byte: without the factor small sites, whose bytes are
    cheap, would all be widest; with the absolute energy a site would count by the scale of its output, which norms and
    softmax after it take out again.
    """
    return relative_loss(row_loss, row_output) * weights


def fisher_loss(row_loss: Tensor, row_gradient: Tensor) -> float:
    """Return the second-order estimate of what an error adds to the model's loss, up to a factor of two.

    row_gradient: [N], the mean over tokens of the squared gradient of the loss at each output, the diagonal of the
    empirical Fisher matrix, which stands for the curvature (Optimal Brain Damage, LeCun et al. 1990; for quantisation
    e.g. SqueezeLLM, 2306.07629, section 4.1). Errors of different outputs are taken as independent of each other.
    """
    return float((row_loss.double() * row_gradient.double()).sum())


def importance(weight: Tensor, gram: Gram | None, site: str = "") -> float:
    """Return ShiftAddLLM's criterion of a site, C = ||IS||_F * STD(IS)^2 (2406.05981, section 4.3).

    IS = W / diag(chol((X X^T)^-1)), column by column, with the upper factor and the damping of 0.01 of the mean
    diagonal that its release uses; an input that was always zero counts as a column of zeros. gram: None takes the
    identity for X X^T. STD is over all entries, unbiased.
    """
    scaled = weight.double()
    if gram is not None:
        prepared = prepare(gram.matrix, tokens=gram.tokens, site=site)
        scaled = (scaled / prepared.upper.diagonal()).masked_fill(prepared.dead, 0.0)
    return float(scaled.norm() * scaled.var())


def importance_loss(criterion: float, bits: int) -> float:
    """Return the modelled loss C_b = C * 4^-bits of ShiftAddLLM's criterion at a width.

    The paper fits C_b over b by polynomials that it does not give; a factor of four a bit is what errors of optimal
    scalar quantisers fall by at high rate.
    """
    return criterion * 4.0**-bits
