"""Builds in a new folder each time: setuptools' own, ``build/``, would bring back modules that have been deleted since.

Everything else is in pyproject.toml.
"""

from __future__ import annotations

from tempfile import TemporaryDirectory

from setuptools import setup
from setuptools.command.build import build

_folder = TemporaryDirectory(prefix="dsv4-backends-build-")  # kept as long as the process


class Build(build):
    def initialize_options(self) -> None:
        super().initialize_options()
        self.build_base = _folder.name


setup(cmdclass={"build": Build})
