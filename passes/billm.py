"""`billm`: weights as one or two planes of signs, salient inputs apart, errors made up for by later inputs (BiLLM)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ir.analysis import LinearSite, blocks, sibling_sites
from ir.edit import Editor
from ir.errors import UnsupportedError
from ir.ops.shiftcode import ShiftCodes
from ir.program import PATH, Program, tensor_type_of
from ir.types import TensorType
from passes.base import Calib, Context, OptionError, Pass, PlanRow, Stage
from passes.checkpoint import load_block, save_block
from passes.moments import moments_of
from passes.quantize.bell import BellSpec, Binarised, binarised, salient_inputs
from passes.quantize.salience import row_energy
from passes.quantize.targets import Moments, corrected
from passes.sites import check_skip, choose_sites, figures, outside_blocks, put_shift_codes, weights_of
from passes.stream import walk

aten = torch.ops.aten


@dataclass(frozen=True)
class Billm(Pass):
    """Binarise weights: the inputs that matter most by their signs and the signs of what these leave, the rest simpler.

    Each linear becomes two, one for salient inputs, which linears that read the same value choose together. Source:
    BiLLM (2402.04291), whose bitmap of the split bell is a plane of signs here and counts as one.
    """

    split: bool = field(
        default=True, metadata={"help": "two sets of other weights, near the middle and far off; false: signs alone"}
    )
    group: int = field(default=128, metadata={"help": "inputs that share scales and an offset in a row"})
    salient: float = field(default=0.1, metadata={"help": "largest share of inputs that are salient"})
    share: float = field(
        default=0.25, metadata={"help": "how much of the correction for what earlier blocks did is taken, 0 to 1"}
    )
    damp: float = field(default=0.01, metadata={"help": "damping of the Hessian, relative to its mean diagonal"})
    skip: tuple[str, ...] = field(default=(), metadata={"help": "sites to leave in float, `*` stands for any text"})

    name: ClassVar[str] = "billm"
    level: ClassVar[tuple[str, str]] = ("model", "compressed")
    stage: ClassVar[Stage] = Stage.QUANTIZE
    order_reason: ClassVar[str] = "it ends in planes of signs, which later passes only tune"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    gives: ClassVar[frozenset[str]] = frozenset({"quant-weights"})
    refuses: ClassVar[frozenset[str]] = frozenset({"masks"})
    data: ClassVar[Calib | None] = Calib("both")
    exact: ClassVar[bool] = False

    def validate(self) -> None:
        """Raise OptionError for values out of range."""
        if not 8 <= self.group <= 1 << 20:
            raise OptionError(self.name, "group", f"{self.group} is outside 8..1048576")
        if not 0 < self.salient <= 0.5:
            raise OptionError(self.name, "salient", f"{self.salient} is outside 0..0.5")
        if not 0 <= self.share <= 1:
            raise OptionError(self.name, "share", f"{self.share} is outside 0..1")
        if not 0 < self.damp <= 1:
            raise OptionError(self.name, "damp", f"{self.damp} is outside (0, 1]")

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the sites; how many inputs are salient, and so the bytes, calibration text decides."""
        nodes = [n for block in blocks(program) for n in block.nodes]
        planes = {"planes": 2.0 if self.split else 1.0}
        return [PlanRow(s.name, self.name, planes) for s in choose_sites(program, nodes, self.skip, Context())]

    def run(self, program: Program, ctx: Context) -> None:
        """Binarise block by block; finished blocks are kept in `ctx.work` and taken from there on a resumed run."""
        nodes = [n for block in blocks(program) for n in block.nodes]
        check_skip(program, self.skip, self.name)
        choose_sites(program, nodes, self.skip, ctx)
        outside_blocks(program, nodes, self.skip, ctx)
        for walked in walk(program, ctx, "both", self.name):
            groups = sibling_sites(choose_sites(program, walked.block.nodes, self.skip, Context()))
            found = load_block(ctx.work, walked.block.index)
            if found is not None:
                for group in groups:
                    self._put(program, group, _restored(found, group), found[1], ctx)
                continue
            kept, facts = dict[str, Tensor](), dict[str, Any]()
            for group, moments in moments_of(walked, groups, True, False):
                solved, said = self._solved(program, group, moments)
                kept |= _kept(group, solved)
                facts |= said
                self._put(program, group, solved, said, ctx)
            save_block(ctx.work, walked.block.index, kept, facts)

    def _solved(
        self, program: Program, group: list[LinearSite], moments: Moments
    ) -> tuple[list[Binarised], dict[str, Any]]:
        """Return the parts of linears that read the same value, and what is to be said of each, by the node's name."""
        spec = BellSpec(self.group, self.salient, 2 if self.split else 1, damp=self.damp)
        weights = [weights_of(program, [site], self.name).double() for site in group]
        hessian, why = moments.gram.matrix.double(), ""
        targets = weights
        try:
            if not bool(hessian.diagonal().any()):
                raise UnsupportedError("its inputs were zero", why=f"for all {moments.gram.tokens} tokens")
            targets = [corrected(w, moments, self.damp, self.share) for w in weights]
            chosen = salient_inputs(targets, hessian, spec)
            parts = [binarised(w, hessian, chosen, spec) for w in targets]
        except UnsupportedError as error:
            why, targets = f"{error.what} ({error.why}), so it is binarised without them", weights
            chosen = salient_inputs(weights, None, spec)
            parts = [binarised(w, None, chosen, spec) for w in weights]
        said = {}
        for site, target, part in zip(group, targets, parts, strict=True):
            left = target - part.dequantize()
            lost, whole = (float(row_energy(m, None if why else moments.gram).sum()) for m in (left, target))
            bits = sum(codes.stored_bits for codes in part.codes)
            if site is group[0]:
                bits += 32 * site.inputs
            row = figures(bits, site.rows, site.inputs, lost / whole if whole > 0 else 0.0)
            said[site.node.name] = {"figures": {**row, "salient": float(len(chosen))}, "fallback": why}
        return parts, said

    def _put(
        self,
        program: Program,
        group: list[LinearSite],
        parts: list[Binarised],
        said: Mapping[str, Any],
        ctx: Context,
    ) -> None:
        """Put two coded linears and a sum in the place of each of a group's, and report them."""
        editor = Editor(program, self.name).before(min(site.node for site in group))
        x, stem = group[0].node.args[0], group[0].weight.rpartition(".")[0] or group[0].weight.replace(".", "_")
        assert isinstance(x, fx.Node)
        kind, picked = tensor_type_of(x), []
        for name, index in (("salient", parts[0].salient), ("rest", parts[0].rest)):
            own = TensorType(kind.dtype, (*kind.dims[:-1], len(index)))
            node = editor.param(editor.fresh(f"{stem}.{name}_inputs"), index.int())
            picked.append(editor.call(aten.index_select, x, -1, node, like=group[0].node, type=own))
        for site, part in zip(group, parts, strict=True):
            fact = said[site.node.name]
            if fact["fallback"]:
                ctx.log.skip(site.name, fact["fallback"])
            self._split(program, site, picked, part)
            ctx.log.report(site=site.name, **fact["figures"])

    def _split(self, program: Program, site: LinearSite, picked: list[fx.Node], part: Binarised) -> None:
        editor, dtype = Editor(program, self.name).before(site.node), tensor_type_of(site.node).dtype
        stem, made = site.weight.rpartition(".")[0] or site.weight.replace(".", "_"), []
        for name, x, codes in zip(("salient", "rest"), picked, part.codes, strict=True):
            weight = editor.param(editor.fresh(f"{stem}.{name}.weight"), codes.dequantize(dtype))
            given = (x, weight, *(site.node.args[2:] if name == "rest" else ()))
            made.append(editor.call(aten.linear, *given, like=site.node))
            made[-1].meta[PATH] = f"{site.name}.{name}"
        total = editor.call(aten.add, *made, like=site.node)
        editor.replace(site.node, total, keep_name=True)
        editor.erase(site.node)
        for node, codes in zip(made, part.codes, strict=True):
            bias = node.args[2] if len(node.args) > 2 else None
            stored = str(node.all_input_nodes[1].target)
            own = LinearSite(str(node.meta[PATH]), node, stored, codes.rows, codes.in_features, bias)  # type: ignore[arg-type]
            put_shift_codes(program, own, codes, self.name)
        editor.sweep()


def _kept(group: list[LinearSite], parts: list[Binarised]) -> dict[str, Tensor]:
    """Return the tensors of a group's parts, by node's name."""
    found: dict[str, Tensor] = {}
    for site, part in zip(group, parts, strict=True):
        stem = site.node.name
        found |= {f"{stem}/salient": part.salient, f"{stem}/rest": part.rest}
        for which, codes in zip(("first", "second"), part.codes, strict=True):
            found |= {f"{stem}/{which}/{name}": t for name, t in codes.tensors().items()}
            found[f"{stem}/{which}/group"] = torch.tensor(codes.group)
    return found


def _restored(found: tuple[dict[str, Tensor], dict[str, Any]], group: list[LinearSite]) -> list[Binarised]:
    """Return the parts that `_kept` took apart."""
    parts = []
    for site in group:
        own = {
            n.removeprefix(f"{site.node.name}/"): t for n, t in found[0].items() if n.startswith(f"{site.node.name}/")
        }
        codes = []
        for which in ("first", "second"):
            t = {name.removeprefix(f"{which}/"): value for name, value in own.items() if name.startswith(f"{which}/")}
            inputs = len(own["salient" if which == "first" else "rest"])
            codes.append(ShiftCodes(t["signs"], t["scales"], None, t["offsets"], int(t["group"]), 0, inputs))
        parts.append(Binarised(own["salient"], own["rest"], (codes[0], codes[1])))
    return parts
