"""All of it is declared in pyproject.toml; this file serves old pips and `python setup.py`."""

from setuptools import setup

setup()
