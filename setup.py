"""Adds compiled kernels to a wheel; where there is no working compiler the wheel is plain Python and says so.

An installation for development gets none either way: there the library is built on first use, into the user's cache.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))

from backends.native.build import LIBRARY, build, stamp_of
from ir.errors import UnsupportedError


class NomulDistribution(Distribution):
    """Is of one platform when kernels were compiled for it."""

    kernels = False

    def has_ext_modules(self) -> bool:
        """Return whether the files go where those of one platform belong."""
        return self.kernels


class BuildWithKernels(build_py):
    """Copies the packages and compiles the kernels beside them."""

    def run(self) -> None:
        """Build into the build directory; raises nothing where the compiler is missing or fails."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "backends" / "native" / LIBRARY
        # A build directory outlives a build, and what it holds is shipped.
        for stale in (target, stamp_of(target)):
            stale.unlink(missing_ok=True)
        try:
            build(target)
        except UnsupportedError as error:
            self.announce(f"nomul: the wheel has no compiled kernels.\n{error}", logging.WARNING)
            return
        self.announce(f"nomul: compiled kernels into {target}", logging.INFO)
        assert isinstance(self.distribution, NomulDistribution)
        self.distribution.kernels = True


class Wheel(bdist_wheel):
    """Names the platform of a wheel with kernels, which fit every Python; other wheels fit every platform."""

    def run(self) -> None:
        """Build first: whether there are kernels decides where files go."""
        self.run_command("build_py")
        assert isinstance(self.distribution, NomulDistribution)
        self.root_is_pure = not self.distribution.kernels
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of Python, its interface and the platform."""
        python, interface, platform = super().get_tag()
        return (python, interface, platform) if self.root_is_pure else ("py3", "none", platform)


setup(distclass=NomulDistribution, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": Wheel})
