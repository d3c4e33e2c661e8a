import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from browsers import DEVICES, needs_browser, opened
from PIL import Image

from ttame_jax.cli import main
from ttame_jax.experiments.report import _order
from ttame_jax.pictures import heatmap
from ttame_jax.preprocessing import to_float
from ttame_jax.runs import load_explainer


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory):
    """A run whose logs have lines of several epochs, with its report and its figures."""
    folder = tmp_path_factory.mktemp("report") / "run"
    shutil.copytree(run, folder)
    lines = [
        {
            "step": step,
            "epoch": step,
            **{f"{k}_{v}": 9.0 * step for k in ("AD", "IC") for v in (100, 50, 15)},
        }
        for step in range(3)
    ]
    (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--run", str(folder), "--batch-size", "8", "--limit", "16", "--measures", "ad,ic,road"]
    main(["report", *words])
    main(["evaluate", *words, "--output", str(folder / "figures.json")])
    return folder


@pytest.fixture(scope="module")
def page(finished):
    return (finished / "report.html").read_text()


def test_the_page_needs_no_other_file(page):
    for address in re.findall(r'(?:src="|href="|url\()([^")]*)', page):
        assert address.startswith(("data:image/jpeg", "#")), address
    assert "@import" not in page and "<link" not in page


def test_the_figures_are_those_of_an_evaluation(page, finished):
    figures = json.loads((finished / "figures.json").read_text())
    for key, arrow in (("AD", "↓"), ("IC", "↑")):
        for v in ("100", "50", "15"):
            low, high = figures["intervals"][key][v]
            row = f"{key}{arrow}({v}%) {figures[key][v]:.1f} {low:.1f} to {high:.1f}"
            assert row in " ".join(re.sub("<[^>]*>", " ", page).split())
    assert "MoRF" in page and f"{figures['ROAD']['LeRF']['mean']:.1f}" in page


def test_training_curves_are_described_in_words(page):
    assert "AD of the validation images, % by epoch: AD(100%) from 0 to 18, " in page
    assert "Loss and its terms by step: loss from " in page
    assert page.count("<svg") == 5  # with the ROAD curves


def test_pictures_are_the_evaluated_crops_and_their_heatmaps(page, run, finished):
    from ttame_jax.data import evaluation_batches, load_source

    explainer = load_explainer(run)
    config = json.loads((finished / "config.json").read_text())
    source = load_source(config["dataset"], "validation")
    (batch,) = evaluation_batches(source, explainer.backbone.preprocessing, 1, indices=[0])
    image, first, second = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), float)
        for data in re.findall(r"data:image/jpeg;base64,([^\"]*)", page)[:3]
    )
    np.testing.assert_allclose(image, batch["image"][0], atol=30)
    maps = explainer(to_float(batch["image"]), "top2").maps[0]
    for drawn, values in zip((first, second), maps):
        assert np.abs(drawn - heatmap(values, (32, 32))).mean() < 4


def test_images_are_ordered_by_their_drops():
    rows = {
        "confidence": np.array([0.5, 0.5, 0.5, 0.5]),
        "masked": np.array([[0.1, 0.1], [0.6, 0.5], [0.9, 0.8], [0.5, 0.4]]),
    }
    assert _order(rows).tolist() == [2, 1, 3, 0]


def test_classes_add_up_to_all_images(page):
    table = page.partition('id="classes"')[2].partition("</table>")[0]
    counts = [int(count) for count in re.findall(r"<td>(\d+)<td>", table)]
    assert sum(counts) == 16 and counts == sorted(counts, reverse=True)


def test_the_configuration_has_no_place_of_the_machine(page, finished):
    table = page.partition('id="configuration"')[2]
    assert "loss.recipe" in table and str(finished) not in page


def test_a_report_needs_ad(run, refusal):
    status, said = refusal(["report", "--run", run, "--measures", "road"])
    assert status == 2 and "--measures must include ad" in said


@needs_browser
@pytest.mark.parametrize("device", DEVICES)
def test_the_slider_fades_between_image_and_heatmap(browser, finished, device):
    address = (finished / "report.html").as_uri()
    with opened(browser, address, offline=True, **DEVICES[device]) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        wide = "[...document.querySelectorAll('figcaption')].filter(e => e.scrollWidth > e.clientWidth)"
        assert tab.evaluate(f"{wide}.length") == 0
        figure, other = tab.locator("figure").nth(0), tab.locator("figure").nth(1)
        slider, shown = figure.get_by_role("slider"), figure.locator(".map").nth(0)

        def opacity(one):
            return float(one.evaluate("one => getComputedStyle(one).opacity"))

        assert opacity(shown) == 0.5
        slider.focus()
        tab.keyboard.press("Home")
        assert opacity(shown) == 0 and opacity(other.locator(".map").nth(0)) == 0.5
        tab.keyboard.press("End")
        assert opacity(shown) == 1
        tab.get_by_role("slider", name="all maps").fill("20")
        assert opacity(shown) == opacity(other.locator(".map").nth(0)) == 0.2
        assert slider.input_value() == "20"


@needs_browser
def test_a_radio_button_chooses_the_class_of_the_map(browser, finished):
    with opened(browser, (finished / "report.html").as_uri(), offline=True) as tab:
        figure = tab.locator("figure").nth(0)
        first, second = figure.locator(".map").all()
        assert first.is_visible() and not second.is_visible()
        figure.get_by_role("radio").nth(0).focus()
        tab.keyboard.press("ArrowDown")
        assert second.is_visible() and not first.is_visible()
