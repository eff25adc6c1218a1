"""From a benchmark's record to what people read: means, tests, tables, sentences, the page."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from bench_record import BUDGET, METHODS, cell, record
from rich.console import Console
from scipy import stats

from analysis import side_by_side
from ray_subnets.benchmark import report as benchmarkreport
from ray_subnets.benchmark import table as benchmarktable
from ray_subnets.benchmark.frame import aggregate, cells, frames, holm, paired_p, progress
from ray_subnets.benchmark.verdict import verdict
from ray_subnets.checkpoints import RunFolder

TASK = "task"


def by_hand(nll: dict[str, list[float]], **changes: Any) -> dict[str, Any]:
    """A record of one task and column with these NLLs by row and seed; NaN: that cell failed."""
    count = max(map(len, nll.values()))
    found = record(tuple(nll), (TASK,), ("adam",), range(count), **changes)
    for one in found["cells"]:
        value = nll[one["row"]][one["seed"]]
        if math.isnan(value):
            for key in set(one) - {"id", "task", "row", "column", "seed"}:
                del one[key]
            one["error"] = "diverged"
        else:
            one["test"] |= {"nll": value, "accuracy": 1 - value}
    return found


# --- numbers ---


def test_mean_and_standard_error_by_hand() -> None:
    """1, 2, 6: mean 3, deviation sqrt((4 + 1 + 9) / 2) = sqrt(7), of three seeds / sqrt(3)."""
    row = aggregate(by_hand({"independent": [1.0, 2.0, 6.0]}), TASK, "adam").loc["independent"]
    assert row["test_nll"] == pytest.approx(3.0)
    assert row["test_nll_se"] == pytest.approx(math.sqrt(7 / 3))
    assert (row["n"], row["failed"], row["missing"]) == (3, 0, 0)
    assert row["nll_stands"] == row["accuracy_stands"] == "best"
    assert math.isnan(row["nll_p"])


def test_paired_p_by_hand_and_by_scipy() -> None:
    """Differences 1, 2, 3: t = 2 / (1 / sqrt 3) = sqrt 12 with 2 degrees of freedom.

    There the two-sided p is 1 - t / sqrt(t^2 + 2).
    """
    one, other = [2.0, 4.0, 6.0], [1.0, 2.0, 3.0]
    expected = 1 - math.sqrt(12) / math.sqrt(14)
    assert paired_p(one, other) == pytest.approx(expected, rel=1e-9)
    assert paired_p(one, other) == pytest.approx(stats.ttest_rel(one, other).pvalue)


def test_pairs_are_of_the_seeds_that_both_have() -> None:
    nan = float("nan")
    one, other = [2.0, 9.0, 4.0, 6.0], [1.0, nan, 2.0, 3.0]
    assert paired_p(one, other) == pytest.approx(1 - math.sqrt(12 / 14))
    assert math.isnan(paired_p([2.0, nan, 4.0], [1.0, 2.0, 3.0]))  # two pairs: nothing is claimed


def test_degenerate_pairs() -> None:
    assert paired_p([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1.0
    assert paired_p([1.5, 2.5, 3.5], [1.0, 2.0, 3.0]) == pytest.approx(0.0, abs=1e-12)
    assert math.isnan(paired_p([math.inf, 2.0, 3.0], [1.0, 2.0, 3.0]))


def test_holm_by_hand() -> None:
    """.01 x 4, .02 x 3, .03 x 2 and .04 x 1, the last two not below the one before them."""
    p = pd.Series({"d": 0.04, "a": 0.01, "none": np.nan, "c": 0.03, "b": 0.02})
    found = holm(p)
    assert list(found.index) == list(p.index)
    expected = {"a": 0.04, "b": 0.06, "c": 0.06, "d": 0.06}
    assert found.dropna().to_dict() == pytest.approx(expected)
    assert math.isnan(found["none"])
    assert holm(pd.Series({"a": 0.7, "b": 0.6})).tolist() == [1.0, 1.0]


THREE = {
    "independent": [0.50, 0.51, 0.53],
    "dropout": [0.40, 0.42, 0.43],  # the best
    "snapshot": [0.41, 0.41, 0.45],
}


def test_rows_against_the_best() -> None:
    table = aggregate(by_hand(THREE), TASK, "adam")
    assert table["nll_stands"].to_dict() == {
        "independent": "apart",
        "dropout": "best",
        "snapshot": "same",
    }
    raw = {
        name: stats.ttest_rel(THREE[name], THREE["dropout"]).pvalue
        for name in ("independent", "snapshot")
    }
    assert table["nll_p"].dropna().to_dict() == pytest.approx(raw)
    assert table.loc["independent", "nll_p_holm"] == pytest.approx(2 * raw["independent"])
    assert table.loc["snapshot", "nll_p_holm"] == pytest.approx(raw["snapshot"])
    difference = np.subtract(THREE["independent"], THREE["dropout"])
    assert table.loc["independent", "nll_difference"] == pytest.approx(difference.mean())
    assert table.loc["independent", "nll_difference_se"] == pytest.approx(
        difference.std(ddof=1) / math.sqrt(3)
    )
    assert table["accuracy_stands"].to_dict() == table["nll_stands"].to_dict()


def test_nothing_is_claimed_of_two_seeds() -> None:
    found = by_hand({name: values[:2] for name, values in THREE.items()})
    table = aggregate(found, TASK, "adam")
    assert sorted(table["nll_stands"]) == ["best", "untested", "untested"]
    assert table["nll_p"].isna().all()
    (line,) = verdict(found)
    assert "nothing claimed: single model and dropout" in line
    assert line.endswith("against the best (not tested, n = 2).")
    assert "worse" not in line
    assert "distinguishable from it" not in line
    assert "≈" not in benchmarktable.markdown(found).split("## How to read it")[0]
    assert "not tested, n = 2" in benchmarktable.markdown(found)


def test_a_row_beyond_the_budget_is_marked_and_not_the_best() -> None:
    found = by_hand({**THREE, "dense_8x": [0.1, 0.2, 0.3], "treenet": [0.2, 0.2, 0.3]})
    table = aggregate(found, TASK, "adam")
    assert table.loc["dense_8x", "over"] == "8x the epochs, 8x the FLOPs"
    assert table.loc["treenet", "over"] == "1.5x the FLOPs"
    assert set(table["over"][:3]) == {""}
    assert table["nll_stands"].eq("best").idxmax() == "dropout"
    assert table.loc["dense_8x", "nll_difference"] == pytest.approx(0.2 - 1.25 / 3)
    assert "deep ensemble \\*" in benchmarktable.markdown(found)
    said = verdict(found)[0]
    assert "NLL beyond the budget: deep ensemble (8x the epochs, 8x the FLOPs) 0.2000, " in said


@pytest.mark.parametrize(("epochs", "marked"), [(16.7, False), (16.9, True)])
def test_five_per_cent_are_allowed(epochs: float, marked: bool) -> None:
    found = by_hand(THREE)
    for one in found["cells"]:
        if one["row"] == "snapshot":
            one["cost"]["epochs"] = epochs
    assert bool(aggregate(found, TASK, "adam").loc["snapshot", "over"]) == marked


def test_dense_kernels_count_too() -> None:
    """Masked weights that the kernels compute anyway are a cost."""
    found = by_hand(THREE)
    for one in found["cells"]:
        if one["row"] == "snapshot":
            one["cost"] |= {"flops_vs_single": 0.6, "flops_dense_vs_single": 3.0}
    assert aggregate(found, TASK, "adam").loc["snapshot", "over"] == "3x the FLOPs"


# --- failed, missing, few ---


def test_failed_and_missing_cells() -> None:
    nan = float("nan")
    found = by_hand({**THREE, "dropout": [0.1, nan, nan]}, missing=["task-snapshot-adam-2"])
    table = aggregate(found, TASK, "adam")
    assert table[["n", "failed", "missing"]].to_numpy().tolist() == [
        [3, 0, 0],
        [1, 2, 0],
        [2, 0, 1],
    ]
    assert table.loc["dropout", "why"] == "diverged"
    # 0.1 is lower than all, but of one seed: rows with all seeds are those that can be best.
    assert table.loc["independent", "nll_stands"] == "best"
    assert table.loc["dropout", "nll_stands"] == "untested"
    assert progress(found) == "6 of 9 cells done, 2 failed, 1 missing."
    text = benchmarktable.markdown(found)
    assert "- dropout: 1 of 3, 2 failed: diverged" in text
    assert "| 2 of 3 |" in text
    status = frames(found).cells.set_index(["row", "seed"])["status"]
    assert status["dropout", 1] == "failed"
    assert status["snapshot", 2] == "missing"
    assert status["snapshot", 1] == "done"


def test_a_row_all_of_whose_cells_failed() -> None:
    nan = float("nan")
    found = by_hand({**THREE, "independent": [nan] * 3})
    table = aggregate(found, TASK, "adam")
    assert math.isnan(table.loc["independent", "test_nll"])
    assert "The single model has no finished cell." in verdict(found)[0]
    assert "| single model |  |  |" in benchmarktable.markdown(found)
    benchmarktable.latex(found)


def test_nothing_is_done_yet() -> None:
    found = record(missing=[one["id"] for one in record()["cells"]])
    assert verdict(found) == [
        "Fashion-MNIST, MLP, adam: no cell is finished yet.",
        "Fashion-MNIST, MLP, decayed: no cell is finished yet.",
    ]
    assert len(benchmarktable.terminal(found)) == 2
    assert "No cell is finished." in benchmarktable.markdown(found)
    assert frames(found).table["n"].sum() == 0


def test_one_seed_has_no_standard_error() -> None:
    found = record(seeds=[5])
    table = aggregate(found, "Fashion-MNIST, MLP", "adam")
    assert table["test_nll_se"].isna().all()
    assert "±" not in benchmarktable.markdown(found).split("## How to read it")[0]
    assert "nan" not in benchmarktable.markdown(found).lower()


def test_one_row() -> None:
    found = record(rows=("independent",), columns=("adam",))
    (line,) = verdict(found)
    assert "single model has the lowest NLL" in line
    assert "distinguishable" not in line
    assert "number" not in line


def test_an_infinite_nll_is_told_and_not_the_best() -> None:
    found = by_hand({**THREE, "dropout": [0.1, 0.1, math.inf]})
    table = aggregate(found, TASK, "adam")
    assert table.loc["dropout", "test_nll"] == math.inf
    assert table.loc["dropout", "nll_stands"] == "untested"
    assert table.loc["snapshot", "nll_stands"] == "best"
    assert "| inf |" in benchmarktable.markdown(found)


def test_two_titles_alike_are_told_apart() -> None:
    found = by_hand(THREE)
    found["rows"][1]["title"] = "snapshot"
    labels = list(aggregate(found, TASK, "adam")["label"])
    assert labels == ["single model", "snapshot (dropout)", "snapshot (snapshot)"]


def test_a_single_network_has_no_diversity() -> None:
    found = cells(record(rows=("independent", "snapshot"), columns=("adam",)))
    assert found.groupby("row")["diversity_kl"].count().to_dict() == {
        "independent": 0,
        "snapshot": 3,
    }


@pytest.mark.parametrize("spoil", ["cells", "rows", "nll", "cost", "twice"])
def test_a_damaged_record_is_one_line(spoil: str) -> None:
    found = by_hand(THREE)
    if spoil in found:
        del found[spoil]
    elif spoil == "nll":
        del found["cells"][0]["test"]["nll"]
    elif spoil == "cost":
        del found["cells"][0]["cost"]
    else:
        found["cells"].append(found["cells"][0])
    with pytest.raises(ValueError, match=r"^benchmark\.json: ") as error:
        verdict(found)
    assert "\n" not in str(error.value)


# --- sentences and tables ---


def test_the_verdict_says_who_is_best_who_ties_and_where_the_single_model_stands() -> None:
    (line,) = verdict(by_hand({**THREE, "swa": [0.60, 0.61, 0.62]}))
    assert line.startswith(
        f"task, adam: dropout has the lowest NLL within {BUDGET} epochs, 0.4167 ± 0.0088 (n = 3), "
        "with 58.33 ± 0.88 % accuracy. Not distinguishable from it: snapshot. "
    )
    assert "The single model: NLL 0.5133 ± 0.0088, " in line
    assert ", number 3 of 4 by NLL; +0.0967 ± 0.0033 against the best (p " in line
    (line,) = verdict(by_hand({name: THREE[name] for name in ("independent", "dropout")}))
    assert "Every other that could be tested (1) is worse." in line


def test_the_verdict_names_those_that_are_worse_where_these_are_fewer() -> None:
    near = {name: [0.42, 0.39 + i / 100, 0.45] for i, name in enumerate(("swa", "fge", "snapshot"))}
    found = by_hand({"independent": [0.9, 0.91, 0.92], "dropout": [0.40, 0.41, 0.42], **near})
    (line,) = verdict(found)
    assert " Worse: single model. Not distinguishable from it: the 3 others. " in line


def test_every_writer_has_the_same_numbers() -> None:
    found = by_hand(THREE)
    whole = "0.4167 ± 0.0088"
    assert f"**{whole}**" in benchmarktable.markdown(found)
    assert "\\textbf{0.4167 $\\pm$ 0.0088}" in benchmarktable.latex(found)
    buffer = io.StringIO()
    for table in benchmarktable.terminal(found):
        Console(file=buffer, width=80).print(table)
    assert "0.4167(88)" in buffer.getvalue()
    assert "0.4233(133)≈" in buffer.getvalue()
    assert max(map(len, buffer.getvalue().splitlines())) <= 80


def test_names_are_escaped() -> None:
    found = by_hand(THREE)
    found["name"] = "50%_of & all"
    found["rows"][0]["title"] = "a|b *c* [d] <e>"
    text = benchmarktable.markdown(found)
    assert "| a\\|b \\*c\\* \\[d] \\<e> |" in text
    tex = benchmarktable.latex(found)
    assert "50\\%\\_of \\& all" in tex
    assert "a|b *c* [d] $<$e>" in tex
    assert "\\label{tab:50-of-all-task-adam-cost}" in tex
    buffer = io.StringIO()
    Console(file=buffer, width=80).print(benchmarktable.terminal(found)[0])
    assert "a|b *c* [d] <e>" in buffer.getvalue()


def test_columns_of_a_markdown_table_are_as_many_as_its_headings() -> None:
    found = record(failures={"Fashion-MNIST, MLP-snapshot-adam-1": "a | b"})
    for block in re.findall(r"(?:^\|.*\n)+", benchmarktable.markdown(found), flags=re.MULTILINE):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(counts) == 1
    assert "snapshot: 2 of 3, 1 failed: a \\| b" in benchmarktable.markdown(found)


def test_without_shift_there_are_no_columns_of_it() -> None:
    found = record(rows=("independent", "dropout"), shift=False)
    assert "corrupted" not in benchmarktable.markdown(found).split("## Rows")[0]
    assert "AUROC" not in benchmarktable.markdown(found).split("## Rows")[0]
    assert "corrupted" in benchmarktable.markdown(record(rows=("independent", "dropout")))


# --- the page and the files ---


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    found = record(
        columns=("adam",),
        failures={"Fashion-MNIST, MLP-stochastic-adam-1": "out of memory <at> epoch 3"},
        missing=["Fashion-MNIST, MLP-mimo-adam-2"],
    )
    folder = RunFolder.create(tmp_path_factory.mktemp("runs") / "small")
    assert benchmarkreport.write(folder, found) == folder.path("benchmark.html")
    return folder.root, found


def test_the_page_needs_no_network_and_its_ids_are_unique(
    page: tuple[Path, dict[str, Any]],
) -> None:
    text = (page[0] / "benchmark.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']+""", text)
    assert "@import" not in text
    figures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(figures) == 6  # NLL and accuracy against FLOPs, passes and severity
    for figure in figures:
        assert ElementTree.fromstring(figure).get("aria-label")
        for title, *_ in METHODS.values():
            assert title in figure
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for used in re.findall(r"url\(#([^)]+)\)", text) + re.findall(r'href="#([^"]+)"', text):
        assert used in ids


def test_the_page_says_what_the_record_says(page: tuple[Path, dict[str, Any]]) -> None:
    root, found = page
    text = (root / "benchmark.html").read_text()
    table = aggregate(found, "Fashion-MNIST, MLP", "adam")
    for _, row in table.iterrows():
        assert f"{row['test_nll']:.4f}" in text
        assert f"± {row['test_nll_se']:.4f}" in text
    assert "out of memory &lt;at&gt; epoch 3" in text
    assert "2 of 3" in text
    assert "49 of 51 cells done, 1 failed, 1 missing." in text
    assert "cycles of 2 epochs in place of 40" in text
    assert text.count('class="winner"') == 1
    heads = re.search(r"<tr><th class=\"first\" scope.*?</tr>", text, flags=re.DOTALL)
    rows = re.findall(r"<tr[^>]*>\s*<td class=\"first\".*?</tr>", text, flags=re.DOTALL)
    assert heads is not None
    assert {row.count("<td") for row in rows} == {heads[0].count("<th ")}


def test_files_beside_the_page(page: tuple[Path, dict[str, Any]]) -> None:
    root, found = page
    both = frames(found)
    raw = pd.read_csv(root / "cells.csv")
    assert len(raw) == 17 * 3
    assert raw["test_nll"].tolist() == pytest.approx(both.cells["test_nll"].tolist(), nan_ok=True)
    table = pd.read_csv(root / "table.csv").set_index("row")
    done = raw[raw["row"] == "snapshot"]
    assert table.loc["snapshot", "test_nll"] == pytest.approx(done["test_nll"].mean())
    assert table.loc["snapshot", "test_nll_se"] == pytest.approx(done["test_nll"].sem())
    assert (root / "benchmark.md").read_text() == benchmarktable.markdown(found)
    assert (root / "table.tex").read_text() == benchmarktable.latex(found)


def test_it_is_the_same_when_written_again(page: tuple[Path, dict[str, Any]]) -> None:
    root, found = page
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    again = json.loads(json.dumps(found))
    benchmarkreport.write(RunFolder(root), again)
    assert {path.name: path.read_bytes() for path in root.iterdir()} == before


def test_a_cost_of_nothing_and_equal_values_can_be_drawn(tmp_path: Path) -> None:
    """All rows alike, zero FLOPs: axes without a span."""
    found = by_hand({"independent": [0.5] * 3, "noisy": [0.5] * 3})
    for one in found["cells"]:
        one["cost"] |= {"flops_vs_single": 0.0, "flops_dense_vs_single": 0.0, "passes": 1}
    benchmarkreport.write(RunFolder.create(tmp_path / "flat"), found)
    assert verdict(found)[0].count("Not distinguishable") == 1
    assert cell(TASK, "noisy", "adam", 0)["cost"]["passes"] == 8  # what it was


# --- two columns side by side ---


def test_side_by_side_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NLL 1, 2, 6 against 0, 2, 4: 3 ± sqrt(7 / 3); the difference 1, 0, 2 is 1 ± sqrt(1 / 3)."""
    made = by_hand({"independent": [1.0, 2.0, 6.0], "snapshot": [0.0, 2.0, 4.0]})
    (tmp_path / "config.yaml").write_text("name: made")
    (tmp_path / "benchmark.json").write_text(json.dumps(made))
    assert side_by_side.main([str(tmp_path)]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    single = next(row for row in rows if row[0] == "| single model")
    assert single[4] == f"3.000 ± {math.sqrt(7 / 3):.3f}"
    pair = ["--pair", f"{TASK}/independent", f"{TASK}/snapshot"]
    assert side_by_side.main([str(tmp_path), *pair]) == 0
    assert f"| +1.000 ± {math.sqrt(1 / 3):.3f} | 3 |" in capsys.readouterr().out


def test_side_by_side_of_rows_that_were_run_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apart = {"a": {"independent": [1.0, 2.0]}, "b": {"snapshot": [0.0, 2.0]}}
    rows = {key: values for part in apart.values() for key, values in part.items()}
    for name, some in (apart | {"whole": rows}).items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("name: made")
        (tmp_path / name / "benchmark.json").write_text(json.dumps(by_hand(some)))
    assert side_by_side.main([str(tmp_path / "whole")]) == 0
    whole = capsys.readouterr().out
    assert side_by_side.main([str(tmp_path / name) for name in apart]) == 0
    assert capsys.readouterr().out == whole
    assert side_by_side.main([str(tmp_path / name) for name in ("a", "whole")]) == 2
    assert "leave it out" in capsys.readouterr().err


def test_side_by_side_of_what_is_no_benchmark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert side_by_side.main([str(tmp_path)]) == 2
    (tmp_path / "config.yaml").write_text("name: made")
    (tmp_path / "benchmark.json").write_text(json.dumps(by_hand({"independent": [1.0]})))
    assert side_by_side.main([str(tmp_path), "--pair", "task/mimo", "task/independent"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "there are task/independent" in said[1]


def test_a_better_row_with_a_seed_missing_is_the_best_and_never_worse() -> None:
    nan = float("nan")
    five = [0.300, 0.301, 0.299, 0.3005, 0.3]
    better = [0.200, 0.2015, 0.199, 0.2, nan]
    found = by_hand({"independent": five, "dropout": better})
    table = aggregate(found, TASK, "adam")
    assert table["nll_stands"].to_dict() == {"independent": "apart", "dropout": "best"}
    assert table.loc["independent", "nll_pairs"] == 4
    # With two seeds nothing is tested, and the row cannot be the best.
    few = by_hand({"independent": five, "dropout": [0.2, 0.2, nan, nan, nan]})
    assert aggregate(few, TASK, "adam").loc["independent", "nll_stands"] == "best"


def test_rows_that_are_better_than_the_best_within_the_budget_are_ahead() -> None:
    found = by_hand({**THREE, "dense_8x": [0.1, 0.12, 0.13]})
    table = aggregate(found, TASK, "adam")
    assert (
        table.loc["dense_8x", "nll_stands"] == table.loc["dense_8x", "accuracy_stands"] == "ahead"
    )
    assert table.loc["independent", "nll_stands"] == "apart"
