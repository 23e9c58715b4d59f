"""Recurrent layers: RNN, GRU and LSTM in one or both directions, by torch's own where it has the same cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from frontend.onnx.call import Call
from frontend.onnx.registry import operator
from frontend.onnx.values import Ints, as_tensor

Function = Callable[[Tensor], Tensor]
State = tuple[Tensor, ...]

_PLAIN: dict[str, Function] = {
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softsign": F.softsign,
    "softplus": F.softplus,
}
# Functions of a value, alpha and beta, and what these are where they are not given.
_WITH_ALPHA: dict[str, tuple[Callable[..., Tensor], float | None]] = {
    "leakyrelu": (F.leaky_relu, 0.01),
    "elu": (F.elu, 1.0),
    "thresholdedrelu": (lambda x, alpha: torch.where(x >= alpha, x, torch.zeros_like(x)), 1.0),
}
_WITH_BETA: dict[str, tuple[Callable[..., Tensor], float | None, float | None]] = {
    "affine": (lambda x, alpha, beta: alpha * x + beta, None, None),
    "scaledtanh": (lambda x, alpha, beta: alpha * torch.tanh(beta * x), None, None),
    "hardsigmoid": (lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1), 0.2, 0.5),
}
_DEFAULTS = {"RNN": ["tanh"], "GRU": ["sigmoid", "tanh"], "LSTM": ["sigmoid", "tanh", "tanh"]}
# The gates as torch orders them, by their places in ONNX's order.
_ORDERS = {"RNN": [0], "GRU": [1, 0, 2], "LSTM": [0, 2, 3, 1]}


@dataclass(frozen=True)
class _Cell:
    """The weights of one direction and its functions; gates are on the first axis of weights, in ONNX's order."""

    weight: Tensor
    recurrent: Tensor
    bias: Tensor | None
    recurrent_bias: Tensor | None
    peepholes: tuple[Tensor, ...] | None
    functions: list[Function]
    names: list[str]
    clip: float | None
    linear_before_reset: bool

    def apply(self, which: int, x: Tensor) -> Tensor:
        """Return one of the functions of x, which is clipped first if the node says so."""
        return self.functions[which](x if self.clip is None else x.clamp(-self.clip, self.clip))


@operator("RNN", "GRU", "LSTM", raw=True)
def _recurrent(call: Call, *inputs: Any) -> tuple[Tensor, ...]:
    """The results: (step, direction, batch, feature), and the last states without steps."""
    given = [*inputs, *[None] * (8 - len(inputs))]
    lengths = given.pop(4)
    x, weight, recurrent, bias, *states, peepholes = [as_tensor(v) for v in given]
    states = states[: 2 if call.op == "LSTM" else 1]
    if call.flag("input_forget"):
        raise call.refuse("ONNX does not tell how the input and forget gates are coupled")
    first = call.flag("layout")
    x = x.transpose(0, 1) if first else x
    directions = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}
    turned = directions.get(call.text("direction", "forward"))
    if turned is None or weight.shape[0] != len(turned):
        raise call.refuse(f"its direction is {call.text('direction', '')}, and it has weights for {weight.shape[0]}")
    cells = _cells(call, weight, recurrent, bias, peepholes)
    blank = torch.zeros([x.shape[1], recurrent.shape[-1]], dtype=x.dtype)
    steps, lasts = list[Tensor](), list[State]()
    for i, (cell, back) in enumerate(zip(cells, turned, strict=True)):
        begin = tuple(blank if s is None else (s[:, i] if first else s[i]) for s in states)
        found, last = _run(call, cell, x, begin, back, _needed(lengths, x.shape[0]))
        steps.append(found)
        lasts.append(last)
    every = torch.stack(steps, 1)
    ends = [torch.stack(list(s), 1 if first else 0) for s in zip(*lasts, strict=True)]
    return (every.permute(2, 0, 1, 3) if first else every, *ends)


def _needed(lengths: Any, steps: Any) -> Tensor | None:
    """Return the lengths of the sequences, None where all are known to take every step."""
    whole = isinstance(lengths, Ints) and isinstance(steps, int) and all(v == steps for v in lengths.values)
    return None if whole else as_tensor(lengths)


def _cells(call: Call, weight: Tensor, recurrent: Tensor, bias: Any, peepholes: Any) -> list[_Cell]:
    """Return the cell of each direction."""
    count, hidden = weight.shape[0], recurrent.shape[-1]
    named = [n.decode() if isinstance(n, bytes) else str(n) for n in call.get("activations") or []]
    names = [n.lower() for n in named] or _DEFAULTS[call.op] * count
    each = len(_DEFAULTS[call.op])
    if len(names) != each * count:
        raise call.refuse(f"it has {len(names)} activations, for {count} directions with {each}")
    functions = _functions(call, names)
    clip = call.real("clip", 0.0) if call.has("clip") else None
    cells = []
    for i in range(count):
        own = slice(i * each, (i + 1) * each)
        biases = [None, None] if bias is None else list(bias[i].chunk(2))
        holes = None if peepholes is None else peepholes[i].split(hidden)
        cells.append(
            _Cell(
                weight[i],
                recurrent[i],
                biases[0],
                biases[1],
                holes,
                functions[own],
                names[own],
                clip,
                call.flag("linear_before_reset"),
            )
        )
    return cells


def _functions(call: Call, names: Sequence[str]) -> list[Function]:
    """Return functions by their names; each takes alpha and beta from the lists if it has such, else leaves them."""
    alphas, betas = list(call.get("activation_alpha") or []), list(call.get("activation_beta") or [])

    def taken(values: list[Any], otherwise: float | None, name: str) -> float:
        if not values and otherwise is None:
            raise call.refuse(f"its activation {name} lacks a number")
        return float(values.pop(0) if values else otherwise or 0.0)

    found = list[Function]()
    for name in names:
        if name in _PLAIN:
            found.append(_PLAIN[name])
        elif name in _WITH_ALPHA:
            one, alpha = _WITH_ALPHA[name]
            found.append(_bound(one, taken(alphas, alpha, name)))
        elif name in _WITH_BETA:
            two, alpha, beta = _WITH_BETA[name]
            found.append(_bound(two, taken(alphas, alpha, name), taken(betas, beta, name)))
        else:
            raise call.refuse(f"its activation {name} is not known")
    return found


def _bound(function: Callable[..., Tensor], *numbers: float) -> Function:
    """Return a function of one value."""
    return lambda x: function(x, *numbers)


def _run(call: Call, cell: _Cell, x: Tensor, begin: State, back: bool, lengths: Tensor | None) -> tuple[Tensor, State]:
    """Return what one direction gives: the hidden state at each step, and the last states."""
    if lengths is None and cell.clip is None and cell.peepholes is None and _as_torch(call, cell):
        found, *last = _by_torch(call.op, cell, x.flip(0) if back else x, begin)
        return found.flip(0) if back else found, tuple(last)
    if not isinstance(x.shape[0], int):
        raise call.refuse("torch has no such cell, and how many steps it takes is not known")
    return _by_steps(call.op, cell, x, begin, back, lengths)


def _as_torch(call: Call, cell: _Cell) -> bool:
    """Return whether torch has a layer with this cell."""
    if call.op == "RNN":
        return cell.names in (["tanh"], ["relu"])
    return cell.names == _DEFAULTS[call.op] and (call.op == "LSTM" or cell.linear_before_reset)


def _by_torch(op: str, cell: _Cell, x: Tensor, begin: State) -> State:
    """Return what torch's layer gives: the hidden states of all steps and the last states."""

    def ordered(weight: Tensor) -> Tensor:
        order = _ORDERS[op]
        parts = weight.chunk(len(order))
        return torch.cat([parts[i] for i in order]) if len(order) > 1 else weight

    given = [w for w in (cell.weight, cell.recurrent, cell.bias, cell.recurrent_bias) if w is not None]
    layers: dict[str, Callable[..., Any]] = {
        "RNN": torch.rnn_relu if cell.names == ["relu"] else torch.rnn_tanh,
        "GRU": torch.gru,
        "LSTM": torch.lstm,
    }
    states = [s[None] for s in begin]
    start = states if op == "LSTM" else states[0]
    found = layers[op](x, start, [ordered(w) for w in given], cell.bias is not None, 1, 0.0, False, False, False)
    return (found[0], *(s[0] for s in found[1:]))


def _by_steps(
    op: str, cell: _Cell, x: Tensor, state: State, back: bool, lengths: Tensor | None
) -> tuple[Tensor, State]:
    """Return the same step by step; a sequence keeps its state where it has ended, and gives 0."""
    step = {"RNN": _rnn_step, "GRU": _gru_step, "LSTM": _lstm_step}[op]
    count = x.shape[0]
    read = F.linear(x, cell.weight, cell.bias).unbind(0)
    found = list[Tensor]()
    for t in reversed(range(count)) if back else range(count):
        new = step(cell, read[t], state)
        out = new[0]
        if lengths is not None:
            going = (lengths > t)[:, None]
            new = tuple(torch.where(going, a, b) for a, b in zip(new, state, strict=True))
            out = torch.where(going, out, torch.zeros_like(out))
        state = new
        found.append(out)
    return torch.stack(found[::-1] if back else found), state


def _rnn_step(cell: _Cell, x: Tensor, state: State) -> State:
    return (cell.apply(0, x + F.linear(state[0], cell.recurrent, cell.recurrent_bias)),)


def _gru_step(cell: _Cell, x: Tensor, state: State) -> State:
    """Gates: update, reset, hidden; reset is applied to the state before or after the linear map."""
    (h,) = state
    size = h.shape[-1]
    gates, hidden = cell.recurrent.split([2 * size, size])
    bias, hidden_bias = (None, None) if cell.recurrent_bias is None else cell.recurrent_bias.split([2 * size, size])
    x_gates, x_hidden = x.split([2 * size, size], -1)
    update, reset = cell.apply(0, x_gates + F.linear(h, gates, bias)).chunk(2, -1)
    if cell.linear_before_reset:
        inner = reset * F.linear(h, hidden, hidden_bias)
    else:
        inner = F.linear(reset * h, hidden, hidden_bias)
    new = cell.apply(1, x_hidden + inner)
    return ((1 - update) * new + update * h,)


def _lstm_step(cell: _Cell, x: Tensor, state: State) -> State:
    """Gates: input, output, forget, cell; peepholes let the first three see the cell's state."""
    h, c = state
    enter, leave, keep, new = (x + F.linear(h, cell.recurrent, cell.recurrent_bias)).chunk(4, -1)
    if cell.peepholes is not None:
        enter, keep = enter + cell.peepholes[0] * c, keep + cell.peepholes[2] * c
    after = cell.apply(0, keep) * c + cell.apply(0, enter) * cell.apply(1, new)
    if cell.peepholes is not None:
        leave = leave + cell.peepholes[1] * after
    return cell.apply(0, leave) * cell.apply(2, after), after
