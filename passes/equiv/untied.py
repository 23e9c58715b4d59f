"""Scales of queries and keys free of their rotary pairs, as OmniQuant's release has them: not exact under rotation."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch
from torch import Tensor

from passes.equiv.groups import EquivGroup, Slot, TieMap


def untied(group: EquivGroup) -> EquivGroup:
    """Return a q<->k group with a free parameter for each channel of the keys that the group touches.

    Query channels follow the key channel of their own place in the head they read. Under a rotary embedding such scales
    change the function, which the group as found does not (its pairs share a scale). Groups of other kinds come back
    as they are.
    """
    if group.kind != "q<->k" or not group.sinks:
        return group
    widest = max(group.sinks, key=lambda slot: slot.tie.channels)
    sharing = _sharing(widest.tie.index)
    touched = torch.nonzero(widest.tie.index >= 0).flatten()
    number = {int(channel): i for i, channel in enumerate(touched)}
    members = {parameter: [number[c] for c in channels] for parameter, channels in sharing.items()}

    def free(slot: Slot) -> Slot:
        return replace(slot, tie=TieMap(_spread(slot.tie.index, members)))

    sources, sinks = (tuple(free(slot) for slot in slots) for slots in (group.sources, group.sinks))
    return replace(group, sources=sources, sinks=sinks, size=len(touched))


def _sharing(index: Tensor) -> dict[int, list[int]]:
    """Return the channels that follow each parameter, in order."""
    found: dict[int, list[int]] = defaultdict(list)
    for channel, parameter in enumerate(index.tolist()):
        if parameter >= 0:
            found[parameter].append(channel)
    return found


def _spread(index: Tensor, members: dict[int, list[int]]) -> Tensor:
    """Return an index in which the channels of one parameter follow its members in turn."""
    result = torch.full_like(index, -1)
    for parameter, channels in _sharing(index).items():
        own = members[parameter]
        for i, channel in enumerate(channels):
            result[channel] = own[i % len(own)]
    return result
