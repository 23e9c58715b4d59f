"""`roste`: rotations where they pay, and whole weights trained under rounded weights, activations and cache (RoSTE)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from ir.program import Program
from passes.base import Calib, Context, Pass, PlanRow, Stage
from passes.l4q import L4q
from passes.rotate import Rotate
from passes.training.problems import WholeLoss


@dataclass(frozen=True)
class Roste(Pass):
    """Turn what rounds better turned, and train all weights with everything rounded, towards the float model.

    Source: RoSTE (2502.09003): rotations chosen by the error of rounding, then straight-through training; chosen once,
    before. It is `rotate{choose=..}` and `l4q{rank=0 whole act=.. kv=..}`, which have further options.
    """

    bits: int = field(default=4, metadata={"help": "bits of weights, 2 to 8, where the pass bits chose no other"})
    group: int = field(default=64, metadata={"help": "inputs that share a scale; must divide every input"})
    act: int = field(default=4, metadata={"help": "bits of what linears read, 2 to 8; 16 leaves it in float"})
    kv: int = field(default=4, metadata={"help": "bits of the key/value cache, likewise"})
    warm: int = field(default=1, metadata={"help": "epochs block by block, before all blocks are trained together"})
    epochs: int = field(default=1, metadata={"help": "epochs end to end"})
    loss: WholeLoss = field(default="kl", metadata={"help": "towards the float model's predictions, or the text"})
    batch: int = field(default=1, metadata={"help": "samples a step"})
    rate: float = field(default=1e-4, metadata={"help": "learning rate of weights"})
    scale_rate: float = field(default=1e-3, metadata={"help": "learning rate of scales, relative to their size"})
    recompute: bool = field(
        default=True, metadata={"help": "run blocks again on the way back: more work, memory for one block only"}
    )
    seed: int = field(default=0, metadata={"help": "of the rotations' random signs"})
    skip: tuple[str, ...] = field(default=(), metadata={"help": "sites to leave in float, `*` stands for any text"})

    name: ClassVar[str] = "roste"
    level: ClassVar[tuple[str, str]] = ("model", "compressed")
    stage: ClassVar[Stage] = Stage.QUANTIZE
    order_reason: ClassVar[str] = "it ends in codes, which later passes only tune"
    requires: ClassVar[frozenset[str]] = frozenset({"canonical", "folded"})
    gives: ClassVar[frozenset[str]] = frozenset({"quant-weights"})
    refuses: ClassVar[frozenset[str]] = frozenset({"masks"})
    data: ClassVar[Calib | None] = Calib("both", gradients=True, original=True, tokens=True)
    exact: ClassVar[bool] = False

    def validate(self) -> None:
        """Raise OptionError for values that rotations, training or codes cannot have."""
        self._rotation().validate()
        self._training().validate()

    def inserts(self) -> frozenset[str]:
        """Return the operators that code tokens, where activations or caches are to be."""
        return self._training().inserts()

    def plan(self, program: Program) -> list[PlanRow]:
        """Return the sites with the bits and bytes their codes will take; rotations are chosen on calibration text."""
        return self._training().plan(program)

    def run(self, program: Program, ctx: Context) -> None:
        """Choose rotations, write them, and train; a resumed run chooses again and takes the training up."""
        self._rotation().run(program, ctx)
        # Blocks are compared at their exits, so the float model must have the turned stream as well.
        self._training().run(program, replace(ctx, original=program.clone()))

    def _rotation(self) -> Rotate:
        return Rotate(choose=self.bits, seed=self.seed, skip=self.skip)

    def _training(self) -> L4q:
        return L4q(
            bits=self.bits,
            group=self.group,
            rank=0,
            whole=True,
            warm=self.warm,
            act=self.act,
            kv=self.kv,
            epochs=self.epochs,
            loss=self.loss,
            batch=self.batch,
            weight_rate=self.rate,
            scale_rate=self.scale_rate,
            recompute=self.recompute,
            skip=self.skip,
        )
