import csv
import io

import jax
import numpy as np
import pytest

from ttame_jax.experiments.tables import (
    comma_separated,
    comparison_tables,
    latex,
    markdown,
    titles,
)

pytestmark = pytest.mark.quick


def figures(method, ad, ic, morf, images=200, passes=1):
    measured = {
        "AD": {"100": ad, "50": 50.0, "15": 80.0},
        "IC": {"100": ic, "50": 5.0, "15": 1.0},
        "ROAD": {"MoRF": {"mean": morf}, "LeRF": {"mean": 100 - morf}},
    }
    return {
        "method": method,
        "backbone": "vit_b16",
        "images": images,
        "forward_passes": passes,
        **measured,
        "intervals": jax.tree.map(lambda value: [value - 1, value + 1], measured),
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
    lines = markdown(columns, comparison_tables(columns)["ad_ic"]).splitlines()
    assert lines[0] == "| measure | Grad-CAM | RISE (20 images) | no_skip | T-TAME |"
    assert lines[2] == "| AD↓(100%) | 32.12 | 1.00 | <u>9.33</u> | **8.74** |"
    assert lines[3] == "| IC↑(100%) | 22.10 | 99.00 | **50.00** | <u>49.00</u> |"
    assert lines[4] == "| AD↓(50%) | **50.00** | 50.00 | **50.00** | **50.00** |"
    assert lines[-1] == "| FP↓ | 1 | 4000 | 1 | 1 |"


def test_what_is_within_chance_of_the_best_is_marked(columns):
    """The differences of AD(100%) scatter around 0, those of IC(100%) do not."""
    noise = np.random.default_rng(0).normal(size=100)
    measured = [{key: one[key] for key in ("AD", "IC", "ROAD")} for one in columns]
    replicates = [jax.tree.map(lambda value: np.full(100, value), one) for one in measured]
    replicates[2]["AD"]["100"] = 8.7 + noise
    rows = comparison_tables(columns, replicates)["ad_ic"]
    lines = markdown(columns, rows).splitlines()
    assert lines[2] == r"| AD↓(100%) | 32.12 | 1.00 | <u>9.33</u>\* | **8.74** |"
    assert lines[3] == "| IC↑(100%) | 22.10 | 99.00 | **50.00** | <u>49.00</u> |"
    assert lines[-1].startswith(r"\* is within chance of the best")
    text = latex(columns, rows)
    assert r"\underline{9.33}$^{*}$" in text and "* is within chance of the best" in text
    assert "*" not in comma_separated(columns, rows)


def test_equal_as_far_as_two_decimals_tell_share_a_place(columns):
    lines = markdown(columns, comparison_tables(columns)["road"]).splitlines()
    assert lines[2] == "| MoRF↓ | <u>21.40</u> | 1.00 | **17.74** | **17.74** |"
    assert lines[3] == "| LeRF↑ | <u>78.60</u> | 99.00 | **82.26** | **82.26** |"


def test_means_over_seeds_have_their_standard_deviation(columns):
    measured = {key: columns[3][key] for key in columns[3]["intervals"]}
    columns[3] |= {"seeds": 3, "spread": jax.tree.map(lambda value: 0.5, measured)}
    rows = comparison_tables(columns)["ad_ic"]
    lines = markdown(columns, rows).splitlines()
    assert lines[0].endswith("| no_skip | T-TAME (3 seeds) |")
    assert lines[2].endswith("| <u>9.33</u> | **8.74 ± 0.50** |")
    text = latex(columns, rows)
    assert r"\textbf{8.74 $\pm$ 0.50}" in text
    assert r"$\pm$ is the standard deviation over seeds." in text
    columns[3]["images"] = 20
    assert titles(columns)[3] == "T-TAME (3 seeds, 20 images)"


def test_csv_holds_plain_values(columns):
    rows = list(
        csv.reader(io.StringIO(comma_separated(columns, comparison_tables(columns)["ad_ic"])))
    )
    assert rows[1] == ["AD↓(100%)", "32.12", "1.00", "9.33", "8.74"]
    assert len(rows) == 8


def test_latex_escapes_what_latex_would_read(columns):
    text = latex(columns, comparison_tables(columns)["ad_ic"])
    assert r"AD$\downarrow$(100\%) & 32.12 & 1.00 & \underline{9.33} & \textbf{8.74} \\" in text
    assert r"no\_skip" in text
    assert r" & {\scriptsize [31.1, 33.1]} & {\scriptsize [0.0, 2.0]} & " in text
    assert r"\caption{Explanation methods on vit\_b16, 200 images, with 95 \% intervals;" in text
    assert "\n\\begin{tabular}{lrrrr}\n\\toprule\nMeasure & Grad-CAM & " in text


def test_measures_that_a_method_lacks_make_no_table(columns):
    del columns[0]["ROAD"]
    assert list(comparison_tables(columns)) == ["ad_ic"]


def test_every_metric_is_in_its_table(columns):
    for i, column in enumerate(columns):
        for tree, mean in ((column, float(i)), (column["intervals"], [i - 1, i + 1])):
            tree["ROAD_REFERENCE"] = tree["ROAD"]
            tree |= {k: {"mean": mean} for k in ("insertion", "deletion", "pointing", "energy")}
            tree["maxboxacc"] = {"50": mean, "V2": mean}
    titles = {
        table: [row.title for row in rows] for table, rows in comparison_tables(columns).items()
    }
    assert titles == {
        "ad_ic": [f"{key}({percent}%)" for percent in (100, 50, 15) for key in ("AD↓", "IC↑")],
        "road": ["MoRF↓", "LeRF↑"],
        "road_reference": ["MoRF↓", "LeRF↑"],
        "insertion_deletion": ["Insertion↑", "Deletion↓"],
        "localisation": ["Pointing game↑", "Energy↑", "MaxBoxAcc↑", "MaxBoxAccV2↑"],
    }


def test_one_of_two_metrics_of_a_table_makes_a_table(columns):
    for column in columns:
        del column["IC"]
    rows = comparison_tables(columns)["ad_ic"]
    assert [row.title for row in rows] == ["AD↓(100%)", "AD↓(50%)", "AD↓(15%)"]
