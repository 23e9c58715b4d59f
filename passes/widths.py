"""Widths chosen site by site: where one pass writes them and every quantising pass looks them up."""

from __future__ import annotations

from collections.abc import Mapping

from ir.analysis import LinearSite
from ir.program import Program

# Key of `Program.attributes`: {site name: width}.
WIDTHS = "bits"


def width_of(program: Program, site: LinearSite, default: int) -> int:
    """Return the width chosen for a site, in the units of the option `bits`; `default` where none was."""
    return int(program.attributes.get(WIDTHS, {}).get(site.name, default))


def put_widths(program: Program, widths: Mapping[str, int]) -> None:
    """Write the width of every site, by name, in place of all that were written before."""
    program.attributes[WIDTHS] = dict(widths)
    program.version += 1
