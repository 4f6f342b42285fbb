"""Reports: what is written, that it stands alone, and that the picture is readable."""

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from lowbit.errors import InputError
from lowbit.experiment import plot, report

ROWS = [
    {"name": "fp", "method": "fp", "format": "bf16", "file_bytes": 17_200_000, "bits_per_weight": 16.0,
     "perplexity": 14.2, "kl_mean": 0.0, "same_top1": 1.0},
    {"name": "self-noise", "kl_mean": 2.2e-5, "same_top1": 0.998},
    {"name": "RTN | q4_0", "method": "RTN", "format": "q4_0", "file_bytes": 5_200_000, "perplexity": 14.5,
     "kl_mean": 0.02, "same_top1": 0.9948, "seconds": 1.26, "group": 32},
    {"name": "QAT <q4_0>", "method": "QAT", "format": "q4_0", "file_bytes": 5_200_000, "perplexity": 14.3,
     "kl_mean": 0.009, "same_top1": 0.997, "seconds": 88.1},
    {"name": "QAT int2", "method": "QAT", "format": "int2:g64", "file_bytes": 3_500_000, "perplexity": 17.7,
     "kl_mean": 0.22, "kl_p99": float("inf"), "same_top1": 0.94, "seconds": 88.1},
]  # fmt: skip


def test_files(tmp_path):
    paths = report.write_report(ROWS, tmp_path / "out", "A & B", "First.\n\nSecond <b>.")
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(paths)
    rows = json.loads(paths["results.json"].read_text())
    assert [r["name"] for r in rows] == [r["name"] for r in ROWS]
    lines = list(csv.DictReader(paths["results.csv"].read_text().splitlines()))
    assert lines[2]["file_bytes"] == "5200000" and lines[0]["seconds"] == ""
    markdown = paths["report.md"].read_text()
    assert (
        "| 5,200,000 |" in markdown and "99.48 %" in markdown and "2.2e-05" in markdown and "RTN \\| q4_0" in markdown
    )
    width = {len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if line.startswith("|")}
    assert len(width) == 1  # every row has as many cells as the head


def test_results_json_is_standard_json(tmp_path):
    paths = report.write_report(ROWS, tmp_path, "x")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    rows = json.loads(paths["results.json"].read_text(), parse_constant=refuse)
    assert rows[4]["kl_p99"] == "inf"


def test_html_stands_alone_and_is_well_formed(tmp_path):
    text = report.write_report(ROWS, tmp_path, "A & B", "First.\n\nSecond <b>.")["report.html"].read_text()
    assert "http" not in text and 'src="data:image/png;base64,' in text
    assert "QAT &lt;q4_0&gt;" in text and "A &amp; B" in text and "Second &lt;b&gt;." in text

    class Reader(HTMLParser):
        open, cells, texts = [], 0, []

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img"):
                self.open.append(tag)
            self.cells += tag == "td"

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.cells == len(ROWS) * len(report.columns(ROWS))


def test_html_table_sorts(tmp_path):
    """The page's own script, run against a table of plain objects."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node to run the page's script")
    text = report.write_report(ROWS, tmp_path, "x")["report.html"].read_text()
    script = text.split("<script>")[1].split("</script>")[0]
    column = report.columns(ROWS).index("perplexity")
    values = re.findall(r"<tr>(.*?)</tr>", text.split("<tbody>")[1])
    cells = [re.findall(r'data-v="(.*?)"', v) for v in values]
    harness = f"""
    const rows = {json.dumps(cells)}.map(vs => ({{ cells: vs.map(v => ({{dataset: {{v}}}})) }}));
    const body = {{ rows, append(r) {{ body.out.push(r.cells[{column}].dataset.v); }}, out: [] }};
    const ths = rows[0].cells.map(() => ({{ ariaSort: null,
        removeAttribute() {{ this.ariaSort = null }}, setAttribute(k, v) {{ this.ariaSort = v }} }}));
    const buttons = ths.map(th => ({{ parentElement: th, addEventListener(k, f) {{ this.click = f; }} }}));
    const document = {{ querySelectorAll: q => q === "th" ? ths : buttons, querySelector: () => body }};
    {script}
    buttons[{column}].click(); const up = body.out; body.out = []; buttons[{column}].click();
    console.log(JSON.stringify([up, body.out]));
    """
    done = subprocess.run([node, "-e", harness], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    up, down = json.loads(done.stdout)
    assert up == ["14.2", "14.3", "14.5", "17.7", ""]
    assert down == ["17.7", "14.5", "14.3", "14.2", ""]


def test_columns_keep_their_order_and_gain_unknown_keys():
    assert report.columns(ROWS) == [
        "name", "file_bytes", "bits_per_weight", "perplexity", "kl_mean", "kl_p99", "same_top1", "seconds", "group",
    ]  # fmt: skip
    text = report.text_table(ROWS)
    assert len({len(line) for line in text.splitlines()[1:2]}) == 1
    assert "–" in text and "bits/weight" in text.splitlines()[0]


@pytest.mark.parametrize(("rows", "message"), [([], "has 0 rows"), ([{"kl_mean": 1}], "row 0 has name None")])
def test_bad_rows(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        report.write_report(rows, tmp_path / "out", "x")
    assert not (tmp_path / "out").exists()


def test_pareto():
    assert plot.pareto([(3, 1), (1, 3), (2, 4), (2, 2), (4, 1)]) == [(1, 3), (2, 2), (3, 1)]


def test_a_crowded_panel_names_the_best_alone():
    few = plot.Marks([(i, 30 - i, f"p{i}") for i in range(5)], front=[(0, 30)])
    many = plot.Marks([(i, abs(i - 9) + 1, f"p{i}") for i in range(30)])
    many.front = plot.pareto([p[:2] for p in many.points])
    assert len(plot.labelled(few)) == 5
    assert [name for *_, name in plot.labelled(many)] == [f"p{i}" for i in range(10)]


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], [{"name": "x"}], [ROWS[2]] * 12, [{"name": "n", "file_bytes": 3}]])
def test_plot_is_drawn_and_labels_stay_apart(rows, monkeypatch):
    boxes, panels = [], []
    place = plot._place_labels

    def spy(figure, ax, marks):
        place(figure, ax, marks)
        panels.append(len(marks.points))
        boxes.append([t.get_window_extent() for t in ax.texts])

    monkeypatch.setattr(plot, "_place_labels", spy)
    png = plot.draw(rows, "title")
    assert png.startswith(b"\x89PNG") and len(png) > 5000
    if rows is ROWS:
        assert panels == [3, 4]
        for texts in boxes:
            assert not any(a.overlaps(b) for i, a in enumerate(texts) for b in texts[:i])
