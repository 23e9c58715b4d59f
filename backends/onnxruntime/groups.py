"""What a fused group is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from backends.onnxruntime.emitter import Emitter


@dataclass(frozen=True, eq=False)
class Fused:
    """Nodes emitted together, when `root` is reached in the order of the graph.

    binds: the nodes that get their values then; nothing outside the group may read one of them before the root.
    reads: the nodes outside the group whose values it needs. emit: adds ONNX nodes and binds all of `binds`.
    """

    root: fx.Node
    binds: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    emit: Callable[[Emitter], None]
