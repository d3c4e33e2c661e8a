import csv
import io

import pytest

from ttame_jax.experiments.tables import ad_ic_rows, comma_separated, latex, markdown, road_rows


def figures(method, ad, ic, morf, images=200, passes=1):
    return {
        "method": method,
        "images": images,
        "forward_passes": passes,
        "AD": {"100": ad, "50": 50.0, "15": 80.0},
        "IC": {"100": ic, "50": 5.0, "15": 1.0},
        "ROAD": {"MoRF": {"mean": morf}, "LeRF": {"mean": 100 - morf}},
    }


@pytest.fixture
def columns():
    return [
        figures("gradcam", ad=32.116, ic=22.1, morf=21.4),
        figures("rise", ad=1.0, ic=99.0, morf=1.0, images=20, passes=4000),
        figures("no_skip", ad=9.33, ic=50.0, morf=17.74),
        figures("ttame", ad=8.74, ic=49.0, morf=17.7449),
    ]


def test_the_best_is_bold_and_the_second_underlined_whichever_way_is_better(columns):
    lines = markdown(columns, ad_ic_rows(columns)).splitlines()
    assert lines[0] == "| measure | Grad-CAM | RISE (20 images) | no_skip | T-TAME |"
    assert lines[2] == "| AD↓(100%) | 32.12 | 1.00 | <u>9.33</u> | **8.74** |"
    assert lines[3] == "| IC↑(100%) | 22.10 | 99.00 | **50.00** | <u>49.00</u> |"
    assert lines[4] == "| AD↓(50%) | **50.00** | 50.00 | **50.00** | **50.00** |"
    assert lines[-1] == "| FP↓ | 1 | 4000 | 1 | 1 |"


def test_equal_as_far_as_two_decimals_tell_share_a_place(columns):
    lines = markdown(columns, road_rows(columns)).splitlines()
    assert lines[2] == "| MoRF↓ | <u>21.40</u> | 1.00 | **17.74** | **17.74** |"
    assert lines[3] == "| LeRF↑ | <u>78.60</u> | 99.00 | **82.26** | **82.26** |"


def test_csv_holds_plain_values(columns):
    rows = list(csv.reader(io.StringIO(comma_separated(columns, ad_ic_rows(columns)))))
    assert rows[1] == ["AD↓(100%)", "32.12", "1.00", "9.33", "8.74"]
    assert len(rows) == 8


def test_latex_escapes_what_latex_would_read(columns):
    text = latex(columns, ad_ic_rows(columns))
    assert r"AD$\downarrow$(100\%) & 32.12 & 1.00 & \underline{9.33} & \textbf{8.74} \\" in text
    assert r"no\_skip" in text
    assert text.startswith("\\begin{tabular}{lrrrr}\n")


def test_measures_that_a_method_lacks_make_no_table(columns):
    del columns[0]["ROAD"]
    assert road_rows(columns) == []
