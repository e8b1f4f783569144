"""The build backend: setuptools', plus a requirement on torch when the target environment has none.

A plain ``torch`` in ``[build-system] requires`` would make every isolated build download the newest torch, gigabytes of
it, and compile against that one instead of the one that is installed.
"""

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the other PEP 517 and PEP 660 hooks)
from torch_location import WHEN_NONE, find_torch


def _with_torch(requirements: list[str]) -> list[str]:
    return requirements if find_torch() else [*requirements, WHEN_NONE]


def get_requires_for_build_wheel(config_settings=None):
    return _with_torch(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _with_torch(build_meta.get_requires_for_build_editable(config_settings))
