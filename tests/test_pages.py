"""Pages that are written from measurements say what the measurements say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import quality, report
from benchmarks.answers import learning
from benchmarks.answers.page import SECTIONS, Answers, written
from benchmarks.figures import Figures
from benchmarks.measured import PENDING, Measured, filled
from benchmarks.results import Report, Workload

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_of_benchmarks_is_that_of_its_results() -> None:
    names = ("results.json", "avx2.json", "other.json")
    results, avx2, other = (Report.load(ROOT / "benchmarks" / name) for name in names)
    page = (ROOT / "docs" / report.PAGE).read_text()
    assert page == report.page(results, avx2, other), "run `python -m benchmarks.report` and commit docs/"


def test_the_page_of_answers_is_that_of_its_figures() -> None:
    page = (ROOT / "docs" / "answers.md").read_text()
    answers = Answers.load(ROOT / "docs" / "answers.json")
    assert page == written(page, answers), "run `python -m benchmarks.answers --page-only` and commit docs/"
    assert set(answers.figures) == set(SECTIONS)
    assert sorted({row[0] for row in answers.figures["learning"]["fine_tuning"].rows}) == sorted(learning.BITS)


def test_the_page_of_accuracy_is_that_of_its_figures() -> None:
    page, found = (ROOT / "docs" / "accuracy.md").read_text(), Measured.load(ROOT / "benchmarks" / "quality.json")
    assert page == filled(page, quality.blocks(found)), (
        "run `python -m benchmarks.quality --page-only` and commit docs/"
    )
    assert PENDING not in page


def speed_alone() -> Answers:
    columns = {"network": "{}", "threads": "{:,}", "int8, ms": "{:.3g}"}
    floats = dict.fromkeys(("qcompile float32", "inductor float", "pytorch float"), "{:.2f} x")
    figures = Figures(columns | floats, [["net", 1, 0.5, 2.0, None, 3.0]], ["inductor: there is no compiler"])
    return Answers({"cores": "2"}, {"torch": "2"}, {"speed": {"speed": figures}})


def marked(*names: str) -> str:
    return "".join(f"before\n\n<!-- measured: {name} -->\nold\n<!-- end -->\n\nafter\n" for name in names)


def test_a_page_is_filled_between_its_marks() -> None:
    page = written(marked("machine", "speed", "figures: speed", "storage"), speed_alone())
    assert "old" not in page
    assert page.count("before") == page.count("after") == 4
    assert "| net | 1 | 0.5 | 2.00 x |  | 3.00 x |\n\ninductor: there is no compiler\n" in page
    assert "3.0 times as long in eager PyTorch" in page
    assert page.count(PENDING) == 1
    assert written(page, speed_alone()) == page


def test_an_answer_without_a_mark_is_an_error() -> None:
    with pytest.raises(ValueError, match="figures: speed"):
        written(marked("machine", "speed"), speed_alone())


def test_a_mark_without_an_answer_is_an_error_once_all_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in set(SECTIONS) - {"speed"}:
        monkeypatch.delitem(SECTIONS, name)
    with pytest.raises(ValueError, match="nonsense"):
        written(marked("machine", "speed", "figures: speed", "nonsense"), speed_alone())


def test_a_run_of_some_workloads_keeps_the_others(tmp_path: Path) -> None:
    before = Report({"cores": "2"}, {"torch": "2"}, {}, [Workload("a", 1, 5, "old"), Workload("b", 1, 6, "old")])
    before.save(path := tmp_path / "results.json")
    assert before.commits == "old"
    after = Report({"cores": "2"}, {"torch": "2", "openvino": "3"}, {}).kept(path)
    assert after.versions == {"torch": "2", "openvino": "3"}
    after.put(Workload("a", 1, 7, "new"))
    after.put(Workload("a", 16, 8, "new"))
    assert [(w.name, w.macs) for w in after.workloads] == [("a, batch 1", 7), ("b, batch 1", 6), ("a, batch 16", 8)]
    assert after.commits == "new (a, batch 1; a, batch 16), old (b, batch 1)"
    for machine, versions, options in (
        ({"cores": "4"}, {"torch": "2"}, {}),
        ({"cores": "2"}, {"torch": "3"}, {}),
        ({"cores": "2"}, {"torch": "2"}, {"rounds": 1}),
    ):
        assert Report(machine, versions, options).kept(path).workloads == []
    assert Report({}, {}, {}).kept(tmp_path / "none.json").workloads == []
