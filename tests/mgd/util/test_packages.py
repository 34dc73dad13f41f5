"""Missing packages are named before the work, with commands that install them."""

import pytest
from typer.testing import CliRunner

from mgd.cli.main import app
from mgd.errors import MissingPackage
from mgd.util import packages


def test_what_is_installed_passes_and_what_is_not_is_named():
    packages.require("tests", "test", "torch", "json")
    with pytest.raises(MissingPackage, match=r"cakes need no_such_module.*'mgd-kernels\[cake\]'.*'\.\[cake\]'"):
        packages.require("cakes", "cake", "torch", "no_such_module")


@pytest.mark.parametrize("recipe", ["lr-schedule", "smoothness", "rate", "attribute"])
def test_recipes_look_before_they_compute(recipe, monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["recipe", recipe, "--quick"])
    assert isinstance(result.exception, MissingPackage)
