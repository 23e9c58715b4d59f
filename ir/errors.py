"""Errors a person can act on: what happened, where, why, and what to do, with the exit code the command line uses."""

from __future__ import annotations


class NomulError(Exception):
    """Base of every expected failure; `str()` is the whole message and never needs a traceback.

    what: one sentence; where: site, node, file or option; why: the cause; fix: what the user can do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix
        super().__init__(self.render())

    def render(self) -> str:
        """Return the message as lines `what / at / because / try`, leaving out parts that are empty."""
        lines = [self.what]
        for label, text in (("at", self.where), ("because", self.why), ("try", self.fix)):
            if text:
                lines.append(f"  {label}: {text}")
        return "\n".join(lines)


class UsageError(NomulError):
    """The command line, pipeline text or input text is wrong (exit code 2)."""

    exit_code = 2


class UnsupportedError(NomulError):
    """The model, pipeline or target cannot be handled, and nothing was written (exit code 3)."""

    exit_code = 3


class GateError(NomulError):
    """The compiled program failed its quality gate; the artifact is kept and marked (exit code 4)."""

    exit_code = 4


class ResourceError(NomulError):
    """Memory or disk does not suffice (exit code 5)."""

    exit_code = 5


class InvariantError(NomulError):
    """A law of the compiler was broken by a pass or the verifier found a malformed program (exit code 1)."""

    exit_code = 1
