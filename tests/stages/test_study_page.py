"""The page of a study: complete in itself, every picture with words for it, every number where it belongs."""

import copy
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from adagrpo_train.cli.report import main
from adagrpo_train.reports.page import short_commit
from adagrpo_train.reports.page_table import Table
from adagrpo_train.reports.study_page import panel_chart, write_study_page

EVIL = "\"><script>alert(1)</script><img src=x onerror='x'>"
RESULTS: dict[str, Any] = {
    "study": "selection",
    "question": "Which prompts teach most?",
    "provenance": {
        "commit": "0123456789abcdef", "date": "2026-01-02", "machine": "two cores", "versions": {"torch": "9.9"},
        "seconds": 7200.0, "runs": 10,
    },
    "findings": ["The boundary is best.", "Between two others no difference was found."],
    "panels": [
        {
            "title": "Reward", "x_label": "seconds", "y_label": "held-out reward", "note": "Five seeds.",
            "series": [
                {"label": "boundary", "points": [[0, 0.5, 0.4, 0.6], [10, 0.75, 0.7, 0.8]]},
                {"label": "random", "points": [[0, 0.5, None, None], [10, 0.625, None, None]]},
            ],
        }
    ],
    "bars": [
        {
            "title": "Gain over random", "y_label": "difference", "note": "",
            "groups": [
                {"label": "boundary", "value": 0.125, "low": 0.05, "high": 0.2},
                {"label": "hardest", "value": -0.01, "low": -0.05, "high": 0.03},
                {"label": "easiest", "value": -0.25, "low": None, "high": None},
            ],
        }
    ],
    "tables": [
        {
            "title": "All", "note": "", "columns": ["arm", "seeds", "p"],
            "rows": [["random", 5, None], ["best", 5, 0.0125]],
        }
    ],
    "settings": "seeds: [0, 1]\n",
}  # fmt: skip


def page_of(results: dict[str, Any], folder: Path) -> str:
    return write_study_page(results, folder / "report.html").read_text()


def test_every_commit_of_several_is_shortened() -> None:
    long = "0123456789abcdef"
    assert short_commit(f"{long} with changes, {long[::-1]}") == "0123456789ab with changes, fedcba987654"
    assert short_commit(None) == ""


def test_the_page_is_complete_in_itself_and_every_picture_has_words(tmp_path: Path) -> None:
    page = page_of(RESULTS, tmp_path)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:|\#)""", page)
    assert "://" not in page and "@import" not in page and "url(" not in page and "<script" not in page
    assert len(re.findall(r"<svg [^>]*role=\"img\" aria-label=", page)) == page.count("<svg") == 4
    assert "boundary: 0.5 (0.4 to 0.6) at seconds 0, 0.75 (0.7 to 0.8) at seconds 10; random: 0.5 at seconds 0" in page
    assert "boundary: 0.125 (0.05 to 0.2); hardest: -0.01 (-0.05 to 0.03); easiest: -0.25." in page
    assert page.index("The boundary is best.") < page.index("<svg")
    assert "2.0 h" in page and "0123456789ab<" in page and "seeds: [0, 1]" in page


def test_every_link_of_the_page_leads_somewhere(tmp_path: Path) -> None:
    page = page_of(RESULTS, tmp_path)
    links = re.findall(r'href="#([^"]+)"', page)
    assert len(links) == 7
    assert all(f'id="{link}"' in page for link in links)


def test_a_band_spans_its_interval_and_a_curve_without_one_has_none() -> None:
    chart = panel_chart(RESULTS["panels"][0])
    assert chart is not None
    drawn = str(chart.inline())
    assert drawn.count("<polygon") == 2 and drawn.count("<polyline") == 4  # in two sizes
    only_random = copy.deepcopy(RESULTS["panels"][0])
    del only_random["series"][0]
    chart = panel_chart(only_random)
    assert chart is not None and "<polygon" not in str(chart.inline())


def test_dots_whose_interval_includes_zero_are_hollow_and_zero_has_a_line(tmp_path: Path) -> None:
    page = page_of(RESULTS | {"panels": []}, tmp_path)
    dots = re.findall(r'<circle (class="ring"|fill)', page)
    assert dots == ["fill", 'class="ring"', "fill"] * 2  # in two sizes
    assert page.count('<line class="whisker"') == 4
    assert page.count('<line class="zero"') == 2


def test_hostile_texts_do_not_become_markup(tmp_path: Path) -> None:
    def hostile(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: hostile(own) for key, own in value.items()}
        if isinstance(value, list):
            return [hostile(own) for own in value]
        return EVIL if isinstance(value, str) else value

    page = page_of(hostile(RESULTS), tmp_path)
    assert "<script" not in page and "<img" not in page
    assert page.count("&lt;script&gt;") > 20


def test_names_of_figures_may_be_broken_in_headings(tmp_path: Path) -> None:
    table = {**RESULTS["tables"][0], "columns": ["arm", "<b>", "reward/std_mean"]}
    page = page_of(RESULTS | {"tables": [table]}, tmp_path)
    assert "reward/<wbr>std_<wbr>mean</th>" in page and "&lt;b&gt;</th>" in page


def test_a_study_without_anything_measured_says_so(tmp_path: Path) -> None:
    empty = {"findings": [], "panels": [{**RESULTS["panels"][0], "series": []}], "bars": [], "tables": []}
    page = page_of(RESULTS | empty, tmp_path)
    assert "None was written down" in page and "Nothing was measured" in page


def test_numbers_of_a_column_have_equally_many_decimals_and_nothing_is_a_dash() -> None:
    rows = [["a", 5, None, 0.25, ""], ["b", 12, 2e-5, 12345.5, "-0.1 +- 0.1"]]
    table = Table.of("", "", ["arm", "n", "p", "x", "gain"], rows)
    assert table.rows == [["a", "5", "–", "0.25", ""], ["b", "12", "2e-5", "12,346", "-0.1 +- 0.1"]]  # noqa: RUF001
    assert table.numeric == [False, True, True, True, True]


def test_the_command_writes_the_page_and_pictures_with_explicit_colours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    assert main(["study", str(tmp_path), "--svg", str(tmp_path / "svg")]) == 0
    written = capsys.readouterr().out.splitlines()
    assert written == [str(tmp_path / name) for name in ("report.html", "svg/panel_1.svg", "svg/bars_1.svg")]
    for path in written[1:]:
        text = Path(path).read_text()
        root = ElementTree.fromstring(text)
        assert root.get("role") == "img" and "boundary" in str(root.get("aria-label"))
        assert "var(" not in text and "#ffffff" in text


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no such file"), ("{", "not JSON"), ("[1]", "not the results of a study"), ('{"study": "x"}', "question")],
)
def test_a_folder_that_holds_no_study_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    assert main(["study", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
