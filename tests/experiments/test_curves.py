import csv
import json

import pytest
from PIL import Image

from ttame_jax.cli import main
from ttame_jax.experiments.curves import draw

pytestmark = pytest.mark.quick

TENS = [str(v) for v in range(10, 100, 10)]


def figures(path, method, start, images=8):
    values = {v: start - int(v) / 2 for v in TENS}
    curve = {"mean": sum(values.values()) / 9, **values}
    road = {"MoRF": curve, "LeRF": curve}
    path.write_text(json.dumps({"method": method, "images": images, "ROAD": road}))
    return str(path)


def test_curves_are_drawn_and_their_numbers_written(tmp_path, capsys):
    files = [
        figures(tmp_path / "a.json", "ttame", 80),
        figures(tmp_path / "b.json", "gradcam", 60),
    ]
    main(["curves", *files, "--output", str(tmp_path / "out")])
    with Image.open(tmp_path / "out" / "road.png") as picture:
        assert picture.width > 600
    svg = (tmp_path / "out" / "road.svg").read_text()
    assert "<svg" in svg
    rows = list(csv.reader((tmp_path / "out" / "road.csv").open()))
    assert rows[0] == ["method", "order", "mean", *TENS]
    assert [row[:2] for row in rows[1:]] == [
        ["ttame", "MoRF"],
        ["ttame", "LeRF"],
        ["gradcam", "MoRF"],
        ["gradcam", "LeRF"],
    ]
    assert float(rows[1][3]) == 75
    assert "ttame, gradcam" in capsys.readouterr().out


def test_a_method_measured_on_fewer_images_says_so():
    road = {order: {"mean": 50.0, **dict.fromkeys(TENS, 50.0)} for order in ("MoRF", "LeRF")}
    lines = {
        name: {"method": name, "images": n, "ROAD": road} for name, n in (("iia", 8), ("rise", 5))
    }
    axes = draw(lines).axes[0]
    assert axes.get_title() == "MoRF: most relevant first (lower is better)"
    legend = axes.get_legend().get_texts()
    assert [text.get_text() for text in legend] == ["IIA: 50.0", "RISE (5 images): 50.0"]


def test_two_runs_of_a_method_are_named_by_their_files(tmp_path, capsys):
    files = [figures(tmp_path / f"{name}.json", "ttame", 80) for name in ("paper", "reference")]
    main(["curves", *files, "--output", str(tmp_path)])
    assert "paper, reference" in capsys.readouterr().out


def test_a_file_without_road_is_refused(tmp_path, refusal):
    path = tmp_path / "a.json"
    path.write_text('{"method": "ttame", "AD": {}}')
    status, said = refusal(["curves", path, "--output", tmp_path])
    assert status == 2 and "a.json has no ROAD figures" in said


def test_no_line_leaves_the_picture():
    def line(start):
        return {"mean": start, **{v: start - int(v) / 2 for v in TENS}}

    road = {"MoRF": line(50), "LeRF": line(95)}
    figure = draw({"ttame": {"method": "ttame", "images": 8, "ROAD": road}})
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert low == 0
        assert high > 90


def test_files_of_one_name_are_named_with_their_folders(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    files = [figures(tmp_path / name / "ttame.json", "ttame", 80) for name in ("one", "two")]
    main(["curves", *files, files[0], "--output", str(tmp_path)])
    rows = list(csv.reader((tmp_path / "road.csv").open()))
    assert [row[0] for row in rows[1::2]] == ["one/ttame", "two/ttame"]
