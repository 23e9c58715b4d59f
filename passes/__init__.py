"""Passes (Program -> Program), known by name and imported only when one is asked for."""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING

from ir.errors import UnsupportedError

if TYPE_CHECKING:
    from passes.base import Pass

ENTRY_POINT_GROUP = "nomul.passes"

_BUILT_IN = {
    "canon": "passes.canon:Canon",
    "fold": "passes.fold:Fold",
    "smooth": "passes.smooth:Smooth",
    "awq": "passes.awq:Awq",
    "osplus": "passes.osplus:Osplus",
    "affine": "passes.affine:Affine",
    "svid": "passes.svid:Svid",
    "rotate": "passes.rotate:Rotate",
    "bits": "passes.bits:Bits",
    "shiftadd": "passes.shiftadd:ShiftAdd",
    "sparse": "passes.sparse:Sparse",
    "svd": "passes.svd:Svd",
    "slorb": "passes.slorb:Slorb",
    "ast": "passes.ast:Ast",
    "rtn": "passes.rtn:Rtn",
    "gptq": "passes.gptq:Gptq",
    "billm": "passes.billm:Billm",
    "omniquant": "passes.omniquant:Omniquant",
    "cbq": "passes.cbq:Cbq",
    "blockap": "passes.blockap:BlockAp",
    "l4q": "passes.l4q:L4q",
    "roste": "passes.roste:Roste",
    "rabit": "passes.rabit:Rabit",
    "onebit": "passes.onebit:Onebit",
    "act": "passes.act:Act",
    "kv": "passes.kv:Kv",
    "tune-scales": "passes.tune_scales:TuneScales",
    "slim": "passes.slim:Slim",
    "lowrank": "passes.lowrank:Lowrank",
    "to-shiftadd": "passes.to_shiftadd:ToShiftadd",
    "pack": "passes.pack:Pack",
}


@cache
def _brought() -> dict[str, str]:
    """Return the passes that installed packages bring; one under a built-in's name is an error."""
    from importlib.metadata import entry_points

    found: dict[str, str] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if found.setdefault(point.name, _BUILT_IN.get(point.name, point.value)) != point.value:
            raise UnsupportedError(
                f"two installed packages bring a pass {point.name}",
                where=f"{found[point.name]} and {point.value}",
                why=f"both are registered under the entry point group {ENTRY_POINT_GROUP}",
                fix="uninstall one of them",
            )
    return found


def pass_names() -> tuple[str, ...]:
    """Return the names of all passes, built-in ones first, then those that other packages' entry points bring."""
    return (*_BUILT_IN, *sorted(_brought().keys() - _BUILT_IN.keys()))


def load_pass(name: str) -> type[Pass]:
    """Import and return the class of a pass.

    Raises KeyError for a name that `pass_names` lacks, UnsupportedError where what is registered under it cannot be
    imported or is no pass of that name.
    """
    from passes.base import Pass

    target = _BUILT_IN.get(name) or _brought()[name]
    module, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"pass {name} cannot be loaded",
            where=target,
            why=str(error),
            fix="install the package that brings it again, or leave the pass out",
        ) from error
    if not (isinstance(found, type) and issubclass(found, Pass) and found.name == name):
        raise UnsupportedError(
            f"what is registered as pass {name} is not that pass",
            where=target,
            why=f"it is {found!r}",
            fix=f"make it a subclass of passes.base.Pass with name = {name!r}",
        )
    return found
