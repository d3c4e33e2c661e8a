from pathlib import Path

import pytest

from ttame_jax.methods import list_methods, method_title
from ttame_jax.metrics import list_metrics

pytestmark = pytest.mark.quick

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("name", list_methods())
def test_every_method_is_documented(name):
    assert method_title(name) in (DOCS / "methods.md").read_text()


@pytest.mark.parametrize("name", list_metrics())
def test_every_metric_is_documented(name):
    assert f"`{name}`" in (DOCS / "metrics.md").read_text()
