import importlib.util
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest
from browsers import DEVICES, needs_browser, opened
from PIL import Image

from ttame_jax.data.transforms import UnreadableImage
from ttame_jax.experiments.serve import SCREEN, Live, ServeConfig, build_page, serving
from ttame_jax.explainer import Explainer
from ttame_jax.masking import upsample
from ttame_jax.methods import load_method
from ttame_jax.metrics import functional
from ttame_jax.runs import load_explainer

needs_gradio = pytest.mark.skipif(
    not importlib.util.find_spec("gradio"), reason="needs Gradio: pip install 'ttame-jax[serve]'"
)


@pytest.fixture(scope="module")
def live(run):
    return Live(load_explainer(run))


@pytest.fixture(scope="module")
def cnn(random_backbone):
    """The page of Grad-CAM on a CNN, which is shown whole pictures of any size."""
    backbone = random_backbone("squeezenet1_1", num_classes=6, image_size=64)
    return Live(Explainer(load_method("gradcam++", backbone)))


@pytest.fixture(scope="module")
def picture(pictures):
    return min((pictures / "validation").iterdir())


@pytest.fixture
def passes(live, monkeypatch):
    """Counts the calls of the network."""
    calls = []
    monkeypatch.setattr(Explainer, "__call__", _counted(Explainer.__call__, calls))
    monkeypatch.setattr(live, "_predict", _counted(live._predict, calls))
    return calls


def _counted(function, calls):
    def counted(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return counted


def test_a_trained_method_explains_all_classes_in_one_pass(live, picture, passes):
    photograph = live.open(picture)
    everything = live.explain(photograph, range(5), "ttame")
    everything.overlay(3, 0.2, "jet")
    assert len(passes) == 1
    np.testing.assert_array_equal(
        everything.maps, live.explainer.explain_picture(picture, "all").maps
    )


def test_a_map_that_needs_its_own_pass_is_computed_once(live, picture, passes):
    photograph = live.open(picture)
    for _ in range(2):
        shown = live.explain(photograph, [2], "gradcam")
    assert len(passes) == 2
    own = live.explainers["gradcam"].explain_picture(picture, 2)
    np.testing.assert_allclose(shown.maps, own.maps, atol=1e-6)


def test_probabilities_and_labels_are_those_of_the_explainer(live, cnn, picture):
    for page in (live, cnn):
        photograph = page.open(picture)
        own = page.explainer.explain_picture(picture, "top3")
        assert page.likeliest(photograph, 3) == own.classes.tolist()
        assert [page.title(photograph, one) for one in own.classes.tolist()] == own.titles


@pytest.mark.parametrize("percent", [100, 50, 15, 0.5])
@pytest.mark.parametrize(
    ("page", "method"), [("live", "ttame"), ("live", "gradcam"), ("cnn", "gradcam++")]
)
def test_numbers_of_masked_images_are_those_of_the_metrics(page, method, percent, picture, request):
    page = request.getfixturevalue(page)
    backbone, photograph = page.explainer.backbone, page.open(picture)
    images = photograph.view.pixels[None].astype(np.float32) / 255
    maps = page.explain(photograph, [1], method).maps

    def predict(images):
        return jax.nn.softmax(backbone(backbone.preprocessing.standardise(images))[0])

    masked = page.mask(photograph, 1, method, percent)
    np.testing.assert_allclose(masked.confidence, predict(images)[0, 1], rtol=1e-5)
    if percent in (100, 50, 15):
        options = {
            "classes": [1],
            "preprocessing": backbone.preprocessing,
            "masking": backbone.masking,
        }
        drop = functional.average_drop(predict, images, maps, **options)[str(percent)]
        np.testing.assert_allclose(100 * masked.drop, drop, atol=1e-3)
    raised = max(0, masked.confidence - masked.masked_confidence) / masked.confidence
    np.testing.assert_allclose(masked.drop, raised, atol=1e-6)
    assert masked.image.shape == images.shape[1:] and masked.image.dtype == np.uint8


def test_the_masked_image_on_the_page_is_the_one_that_is_classified(cnn, picture):
    photograph = cnn.open(picture)
    pixels = photograph.view.pixels
    maps = cnn.explain(photograph, [1], "gradcam").maps
    mask = np.asarray(upsample(maps, pixels.shape[:2]))[0]
    whole = cnn.mask(photograph, 1, "gradcam", 100).image
    np.testing.assert_allclose(whole, mask[..., None] * pixels, atol=1)
    part = cnn.mask(photograph, 1, "gradcam", 25).image
    kept = (part > 0).any(-1)
    assert 0 < kept.mean() <= 0.25 and mask[kept].min() >= mask[~kept & (mask > 0)].max() - 1e-6


def test_large_photographs_are_reduced_for_the_screen_only(live, tmp_path):
    rng = np.random.default_rng(0)
    large = Image.fromarray(rng.integers(0, 255, (1500, 3000, 3), np.uint8))
    photograph = live.open(large)
    assert photograph.screen.shape == (SCREEN // 2, SCREEN, 3)
    own = live.explainer.explain_picture(large, "all")
    np.testing.assert_allclose(photograph.probabilities, own.probabilities, rtol=1e-5)
    explained = live.explain(photograph, [0], "ttame")
    np.testing.assert_allclose(np.array(explained.box) * 3000 / SCREEN, own.box, rtol=1e-3)
    live.save(photograph, [4, 0], tmp_path / "maps.npz")
    saved = np.load(tmp_path / "maps.npz")
    assert saved["classes"].tolist() == [4, 0] and saved["box"].tolist() == list(own.box)
    np.testing.assert_array_equal(saved["maps"], own.maps[[4, 0]])


def test_photographs_with_too_many_pixels_are_refused(run, picture):
    with pytest.raises(UnreadableImage, match="raise --max-pixels"):
        Live(load_explainer(run), max_pixels=100).open(picture)


def test_a_classifier_of_one_size_is_shown_no_whole_pictures(run):
    with pytest.raises(ValueError, match="inputs of one size, so the page shows it the centre"):
        Live(load_explainer(run), "whole")


def test_a_run_or_a_backbone_is_needed(refusal):
    if importlib.util.find_spec("gradio"):
        assert "give a run, or a backbone" in refusal(["serve"])[1]


@pytest.mark.parametrize(
    "words", [["--port", "0"], ["--max-megabytes", "0"], ["--max-pixels", "0"]]
)
def test_settings_are_checked(words, refusal):
    status, said = refusal(["serve", "--run", "runs/none", *words])
    assert status == 2 and words[0].removeprefix("--") in said


def test_a_missing_gradio_is_named_with_its_extra(monkeypatch, refusal):
    monkeypatch.setitem(sys.modules, "gradio", None)
    status, said = refusal(["serve", "--run", "runs/none"])
    assert status == 1 and "pip install 'ttame-jax[serve]'" in said


def test_gradio_is_imported_by_the_page_only():
    code = (
        "import sys, ttame_jax.cli, ttame_jax.experiments.serve; assert 'gradio' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_page_listens_on_this_machine_only_by_default():
    assert ServeConfig().host == "127.0.0.1"


@needs_gradio
def test_uploads_are_bounded_and_files_stay_in_a_folder_that_is_removed(
    live, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with serving(live, max_megabytes=1) as address:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert _post(address, b"x" * 1000) == 200
        assert len(_files(folder)) == 1
        assert _post(address, b"x" * 2**21) == 413
        assert len(_files(folder)) == 1
        secret = tmp_path.parent / "secret.txt"
        secret.write_text("not for the page")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{address}gradio_api/file={secret}")
        port = int(address.rstrip("/").rpartition(":")[2])
        with pytest.raises(OSError, match=str(port)), serving(live, port=port):
            pass
    assert not folder.exists() and list(tmp_path.iterdir()) == []


def _files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def _post(address, content):
    body = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body += content + b"\r\n--b--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    request = urllib.request.Request(f"{address}gradio_api/upload", body, headers)
    try:
        return urllib.request.urlopen(request).status
    except urllib.error.HTTPError as error:
        return error.code


@needs_gradio
def test_the_page_says_nothing_to_others(live, tmp_path, monkeypatch):
    monkeypatch.setattr("gradio.routes.DEFAULT_TEMP_DIR", str(tmp_path))
    page = build_page(live, tmp_path)
    assert page.analytics_enabled is False
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


@needs_gradio
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_and_removes_its_files(run, tmp_path, number):
    # A shell's background jobs ignore SIGINT, and so would the command.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from ttame_jax.cli import main; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, "serve", "--run", str(run)]
    environment = os.environ | {
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout.readline().startswith("http://127.0.0.1:")
            assert len(list(tmp_path.glob("ttame-serve-*"))) == 1
            server.send_signal(number)
            assert server.wait(60) == 0
        finally:
            server.kill()
    assert list(tmp_path.iterdir()) == []


def numbers(tab, table=0):
    """The rows of a table on the page, by method: psi, psi' and drop in %."""
    rows = tab.locator("table").nth(table).locator("tbody tr")
    rows.first.wait_for()
    cells = [row.locator("td").all_inner_texts() for row in rows.all()]
    return {name: [float(cell.rstrip("%")) for cell in rest] for name, *rest in cells}


def expected(live, photograph, class_id, percent):
    return {
        explainer.method.title: pytest.approx(
            [100 * masked.confidence, 100 * masked.masked_confidence, 100 * masked.drop], abs=0.06
        )
        for method, explainer in live.explainers.items()
        for masked in [live.mask(photograph, class_id, method, percent)]
    }


def eventually(tab, holds):
    """Waits until a condition holds."""
    for _ in range(300):
        if holds():
            return
        tab.wait_for_timeout(100)
    pytest.fail("the page does not show what was asked for")


@needs_gradio
@needs_browser
@pytest.mark.parametrize("device", ["desktop", "phone"])
def test_a_photograph_is_explained_in_a_browser(live, browser, picture, tmp_path, device):
    options = DEVICES[device]
    photograph = live.open(picture)
    best, other, third = live.likeliest(photograph, 3)
    with serving(live) as address, opened(browser, address, **options) as tab:
        tab.locator("input[type=file]").set_input_files(picture)
        tab.get_by_role("heading", name=live.title(photograph, best)).wait_for()
        eventually(tab, lambda: numbers(tab) == expected(live, photograph, best, 50))
        radios = tab.get_by_role("radio")
        assert radios.count() == 5 and radios.nth(0).is_checked()

        radios.nth(0).focus()  # by keyboard
        tab.keyboard.press("Tab")
        tab.keyboard.press("Space")
        tab.get_by_role("heading", name=live.title(photograph, other)).wait_for()
        eventually(tab, lambda: numbers(tab) == expected(live, photograph, other, 50))

        slider = tab.get_by_role("slider", name="v %")
        slider.focus()
        for _ in range(5):
            tab.keyboard.press("ArrowLeft")
        eventually(tab, lambda: numbers(tab) == expected(live, photograph, other, 45))

        tab.get_by_label("Second class").first.focus()
        tab.wait_for_timeout(300)
        tab.keyboard.type(live.title(photograph, third))
        tab.keyboard.press("Enter")
        tab.get_by_role("heading", name=live.title(photograph, third)).wait_for()
        eventually(tab, lambda: numbers(tab, 1) == expected(live, photograph, third, 45))
        assert tab.evaluate("document.documentElement.scrollWidth") <= options["viewport"]["width"]

        with tab.expect_download() as download:
            tab.get_by_role("button", name="Download maps").click()
        download.value.save_as(tmp_path / "maps.npz")
        assert np.load(tmp_path / "maps.npz")["classes"].tolist() == [other, third]
        with tab.expect_download() as download:
            tab.get_by_role("button", name="Download figure").click()
        download.value.save_as(tmp_path / "maps.png")
        assert Image.open(tmp_path / "maps.png").width > 900
        tab.screenshot(path=tmp_path / f"{device}.png", full_page=True)


@needs_gradio
@needs_browser
def test_the_picture_changes_with_the_style_and_not_the_numbers(live, browser, picture, passes):
    with serving(live) as address, opened(browser, address) as tab:
        tab.locator("input[type=file]").set_input_files(picture)
        before = numbers(tab)
        first = tab.get_by_alt_text("T-TAME", exact=True).first
        drawn, count = first.get_attribute("src"), len(passes)
        slider = tab.get_by_role("slider", name="Opacity")
        slider.focus()
        tab.keyboard.press("ArrowRight")
        eventually(tab, lambda: first.get_attribute("src") != drawn)
        assert numbers(tab) == before and len(passes) == count


@needs_gradio
@needs_browser
def test_what_cannot_be_read_is_said_and_the_last_photograph_leaves(
    live, browser, picture, tmp_path
):
    (tmp_path / "broken.jpg").write_text("not a picture")
    with serving(live) as address, opened(browser, address) as tab:
        tab.locator("input[type=file]").set_input_files(picture)
        numbers(tab)
        tab.get_by_label("Remove").or_(tab.get_by_label("Clear")).first.click()
        tab.locator("table").wait_for(state="hidden")
        tab.locator("input[type=file]").set_input_files(tmp_path / "broken.jpg")
        said = tab.get_by_text("cannot decode broken.jpg: cannot identify image file")
        said.first.wait_for()
        assert str(tmp_path) not in said.first.inner_text()
