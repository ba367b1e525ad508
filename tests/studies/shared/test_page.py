"""Pages, tables and pictures."""

import base64
import json
import re
from pathlib import Path

import pytest
from matplotlib.image import imread

from lightning_sae.studies.shared.page import Page, Section, Table, caution, publish
from lightning_sae.studies.shared.plots import COLORS, curves, panels, save
from lightning_sae.studies.shared.rows import Row


def page(**parts: object) -> Page:
    settings = {
        "title": "A study",
        "question": "Is 1 < 2?",
        "method": ["By looking."],
        "settings": {"steps": 3, "model": "embedded"},
        "sections": [],
        "comparison": [],
        "source": "A document",
    }
    return Page(**{**settings, **parts})  # type: ignore[arg-type]


def test_columns_are_aligned_in_the_terminal() -> None:
    table = Table(["", "L0", "a long heading"], [["relu", "12.5", "1"], ["a name", "3", ""]])
    assert list(table.lines()) == [
        "          L0  a long heading",
        "relu    12.5               1",
        "a name     3",
    ]


def test_the_page_needs_no_other_file_and_escapes_what_it_is_given(tmp_path: Path) -> None:
    picture = tmp_path / "dots.png"
    picture.write_bytes(b"not really a picture")
    table = Table(["", "L0"], [["<relu>", "1"]], note="A note.")
    section = Section("Results", ["Seen."], [table], {picture: "Dots"})
    path = page(sections=[section], comparison=[("gamma", "about 1", "0.9")]).write(
        tmp_path / "p.html"
    )
    text = path.read_text(encoding="utf-8")
    for part in (
        "Is 1 &lt; 2?",
        "&lt;relu&gt;",
        "A note.",
        "gamma",
        "steps 3",
        "A document",
        "Seen.",
    ):
        assert part in text
    embedded = re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    assert [base64.b64decode(code) for code in embedded] == [b"not really a picture"]
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_details_are_folded_up_on_the_page_and_not_in_the_terminal(tmp_path: Path) -> None:
    one = Section("Run 1", ["Its figures."], [Table(["latent"], [["0"]])])
    shown = page(sections=[Section("Runs", details=[one])])
    text = shown.write(tmp_path / "p.html").read_text(encoding="utf-8")
    assert text.index("<details>") < text.index("Run 1") < text.index("Its figures.")
    assert text.index("Its figures.") < text.index("<td>0") < text.index("</details>")
    assert list(shown.lines()) == []


def test_publishing_writes_all_files_and_lists_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "dots.png"
    picture.write_bytes(b"dots")
    section = Section("Results", tables=[Table(["x"], [["1"]])], pictures={picture: ""})
    rows = [{"x": 1}, {"x": 2}]
    publish(page(sections=[section], results={"a": 1}, csv={"points": rows}), tmp_path, "in 3 s")
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": 1}
    assert (tmp_path / "points.csv").read_text().split() == ["x", "1", "2"]
    names = ("results.json", "points.csv", "dots.png", "report.html")
    made = ", ".join(str(tmp_path / name) for name in names)
    assert capsys.readouterr().out == f"\nResults\nx\n1\n\nMade: {made}, in 3 s.\n"


def test_the_terminal_has_all_tables_and_the_comparison() -> None:
    sections = [Section(title, tables=[Table(["", "x"], [[title, "1"]])]) for title in ("A", "B")]
    lines = list(page(sections=sections, comparison=[("gamma", "about 1", "0.9")]).lines())
    assert lines[0] == "\nA"
    assert "B  1" in lines
    assert lines[-1] == "  gamma: about 1 | 0.9"
    assert list(page().lines()) == []


def test_a_table_without_figures_is_not_shown(tmp_path: Path) -> None:
    tables = [Table(["", "empty"], []), Table(["", "blank"], [["relu", ""], ["gated", "-"]])]
    shown = page(sections=[Section("All", (), [*tables, Table(["", "full"], [["relu", "1"]])])])
    on_page = shown.write(tmp_path / "p.html").read_text(encoding="utf-8")
    for text in (on_page, "\n".join(shown.lines())):
        assert "full" in text
        assert "empty" not in text
        assert "blank" not in text


def test_poor_saes_are_named_before_all_figures(tmp_path: Path) -> None:
    good: list[Row] = [{"fvu": 0.5}]
    poor: list[Row] = [{"fvu": 0.4}, {"fvu": 0.8}, {"fvu": None}]
    assert caution({"good": good, "unknown": [{}]}) == ""
    words = caution({"good": good, "poor": poor})
    assert "above 0.5 for poor (0.60)" in words
    assert "good" not in words.split(":")[1].split("(")[0]
    warned = page(caution=words, sections=[Section("All", (), [Table(["", "L0"], [["a", "1"]])])])
    on_page = warned.write(tmp_path / "p.html").read_text(encoding="utf-8")
    for text in (on_page, "\n".join(warned.lines())):
        assert text.index("poor (0.60)") < text.index("L0")


def test_curves_are_drawn_from_left_to_right_each_in_its_colour() -> None:
    axes = panels(2, 2)[1]
    assert len(axes) == 4
    series = {"a": [(3.0, 1.0), (1.0, 2.0)], "nothing": [], "c": [(2.0, 5.0)]}
    spread = {"a": [(0.3, 0.1), (0.1, 0.2)]}
    curves(axes[0], series, x="L0", y="CE (nats)", spread=spread, logarithmic=True)
    first, last = axes[0].containers
    assert list(first[0].get_xdata()) == [1.0, 3.0]
    assert list(first[0].get_ydata()) == [2.0, 1.0]
    assert [c[0].get_color() for c in (first, last)] == [COLORS[0], COLORS[2]]
    horizontal = first[2][0].get_segments()
    assert [tuple(segment[:, 0]) for segment in horizontal] == [
        pytest.approx((0.9, 1.1)),
        pytest.approx((2.7, 3.3)),
    ]
    assert (axes[0].get_xlabel(), axes[0].get_ylabel()) == ("L0", "CE (nats)")
    assert axes[0].get_xscale() == "log"


def test_labels_of_a_logarithmic_axis_are_few_and_plain() -> None:
    figure, axes = panels(1)
    curves(axes[0], {"a": [(2.3, 1.0), (60.0, 2.0)]}, x="L0", y="y", logarithmic=True)
    figure.draw_without_rendering()
    shown = [text.get_text() for text in axes[0].get_xticklabels(which="both")]
    assert (
        {"5", "10", "20", "50"} <= {*shown} <= {"", "1", "2", "5", "10", "20", "50", "100", "200"}
    )


def test_a_picture_has_one_legend_for_all_panels(tmp_path: Path) -> None:
    figure, axes = panels(2)
    for panel in axes:
        curves(panel, {"a": [(1.0, 1.0)], "b": [(2.0, 1.0)]}, x="x", y="y")
    path = save(figure, tmp_path / "new" / "picture.png")
    assert imread(path).ndim == 3
    assert len(figure.legends) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_a_picture_without_labels_has_no_legend(tmp_path: Path) -> None:
    figure, axes = panels(1)
    axes[0].plot([1, 2])
    save(figure, tmp_path / "picture.png")
    assert not figure.legends
