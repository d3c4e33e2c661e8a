"""The survey of timm's models that writes docs/timm.md."""

import pytest

pytest.importorskip("torch")

from ttame_jax.convert import timm_table

SMALL = "test_efficientnet"
"""One of timm's models for tests, with 0.4 million parameters."""


def test_a_small_model_has_a_difference_and_a_large_one_has_none():
    found = timm_table.survey(SMALL, limit=1)
    assert found["difference"] < 1e-5 and "own" not in found
    assert timm_table.survey(SMALL, limit=0.1)["difference"] is None


def test_a_notable_difference_stands_beside_pytorchs_own(monkeypatch):
    monkeypatch.setattr(timm_table, "NOTABLE", 0)
    found = timm_table.survey(SMALL, limit=1)
    assert 0 < found["own"] < 1e-5 and found["difference"] < 1e-5


def test_tables_list_what_is_supported_and_why_others_are_not():
    supported = {"has_classifier": True, "million_parameters": 1.234, "image_size": 64}
    text = timm_table.tables(
        [
            {"model": "one", **supported, "difference": 1e-6},
            {"model": "two", **supported, "difference": 2e-5, "own": 3e-5},
            {"model": "three", **supported, "has_classifier": False, "difference": None},
            {"model": "four", "refusal": "it has a reason"},
            {"model": "five", "refusal": "it has a reason"},
        ]
    )
    assert "## Supported: 3" in text and "## Not supported: 2" in text
    assert "| one | 1.2 | 64 | 1.0e-06 |" in text
    assert "| two | 1.2 | 64 | 2.0e-05 (3.0e-05) |" in text
    assert "| three* | 1.2 | 64 |  |" in text
    assert "| it has a reason | four, five |" in text
