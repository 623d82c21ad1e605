"""A sweep's report: what it says, that it needs nothing else, and that labels stay words."""

from __future__ import annotations

import base64
import itertools
import json
import math
import re
import shutil
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from pipelines.cards import model_card
from pipelines.costs import Cost
from pipelines.overviews import over_costs, parallel_coordinates
from pipelines.page import write_report
from pipelines.ranking import (
    Chosen,
    Provenance,
    Ranked,
    RankedTeacher,
    Ranking,
    Unfinished,
    compared,
    read_ranking,
    write_ranking,
)
from pipelines.samples import epoch_grid, png, put
from pipelines.significance import holm, paired_test

COST = Cost(parameters=1702, flops=123_456, latency_s=0.002)
WEIGHT, WIDTH = "losses.distill.weight", "student.params.width"


def row(label: str, values: list[float], *, control: bool = False, **numbers: float) -> Ranked:
    paths = {name.replace("__", "."): value for name, value in numbers.items()}
    return Ranked(
        label=label,
        control=control,
        setting="",
        changes={**paths, "seed": 0, "losses.distill.loss": label},
        numbers=paths,
        seeds=list(range(len(values))),
        values=values,
        runs=[f"runs/{label.split()[0]}-{seed}" for seed in range(len(values))],
        cost=COST,
    )


ROWS = [
    row("kd", [0.9, 0.92, 0.95], losses__distill__weight=1.0, student__params__width=4),
    row("mse", [0.8, 0.85, 0.84], losses__distill__weight=2.0, student__params__width=4),
    row("w2", [0.8, 0.81, 0.83], losses__distill__weight=1.0, student__params__width=8),
    row("no distillation (control)", [0.7, 0.74, 0.73], control=True),
]
BEST = {
    "student": {"name": "convnet"},
    "data": {"name": "digits", "validation": 0.2},
    "losses": {
        "distill": {"loss": "kd", "weight": 0.9, "params": {"temperature": 4.0}, "layers": {}},
        "mid": {"loss": "mse", "weight": 1.0, "params": {}, "layers": {"block1": "block3"}},
    },
    "epochs": 2,
    "batch_size": 32,
    "seed": 2,
}
RANKING = Ranking(
    name="toys",
    metric="val/top1",
    mode="max",
    rows=ROWS,
    failed=[Unfinished({WEIGHT: 1e30}, error="the loss is nan")],
    stopped=[Unfinished({WEIGHT: 3.0}, metrics={"epoch": 2.0, "val/top1": 0.25})],
    teachers=[
        RankedTeacher("teacher", "convnet", "t.safetensors", "cafe", {"val/top1": 0.97}, COST)
    ],
    best=Chosen({WEIGHT: 1.0}, "runs/kd-2/best.safetensors", BEST),
    test={"test/top1": 0.8125},
    made=Provenance(
        "kd sweep toys.yaml", "abc123", "d1935", ["cafe"], {"base": {"data": {"name": "digits"}}}
    ),
)


class Page(HTMLParser):
    """The tags of a page, their attributes and its words; every tag must be closed in order."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def history(start: float) -> list[dict[str, float]]:
    names = ("val/top1", "val/nll", "train/loss")
    return [{"epoch": float(e), **dict.fromkeys(names, start + e)} for e in (1, 2)]


def written(root: Path, ranking: Ranking = RANKING) -> Path:
    """The folder of a sweep with its runs beside it."""
    for held in ranking.rows:
        for run, value in zip(held.runs, held.values, strict=True):
            (root / run).mkdir(parents=True, exist_ok=True)
            (root / run / "result.json").write_text(json.dumps({"history": history(value)}))
    folder = root / "runs" / "sweeps" / "toys-123"
    write_ranking(ranking, folder)
    return folder


def test_a_ranking_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_ranking(RANKING, tmp_path)
    assert read_ranking(tmp_path) == RANKING


def test_what_is_no_ranking_of_ours_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has not been run: no .*ranking\.json; run `kd sweep`"):
        read_ranking(tmp_path)
    (tmp_path / "ranking.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="of another version"):
        read_ranking(tmp_path)


def test_every_row_is_tested_against_its_control_over_shared_seeds() -> None:
    control = ROWS[-1]
    late = replace(ROWS[2], seeds=[1, 2, 3])  # its first two values meet the control's last two
    kd, mse, w2, none = compared([ROWS[0], ROWS[1], late, control])
    assert none is None
    assert kd is not None
    assert mse is not None
    assert w2 is not None
    expected = [
        paired_test([0.9, 0.92, 0.95], [0.7, 0.74, 0.73]),
        paired_test([0.8, 0.85, 0.84], [0.7, 0.74, 0.73]),
        paired_test([0.8, 0.81], [0.74, 0.73]),
    ]
    assert [kd.p_value, mse.p_value, w2.p_value] == pytest.approx(expected)
    assert [kd.corrected, mse.corrected, w2.corrected] == pytest.approx(holm(expected))
    assert w2.difference == pytest.approx(0.805 - 0.735)


def test_a_row_without_a_control_of_its_setting_is_compared_with_the_one_of_none() -> None:
    wide = replace(ROWS[0], setting="width=8")
    same = replace(ROWS[-1], setting="width=8", values=[0.5, 0.5, 0.6])
    assert compared([wide, ROWS[-1]])[0] is not None
    (first, *_) = compared([wide, ROWS[-1], same])
    assert first is not None
    assert first.difference == pytest.approx(0.92333333 - 0.53333333)
    assert compared([wide, replace(ROWS[-1], setting="lr=1")])[0] is None


def test_the_page_says_what_was_found_and_how(tmp_path: Path) -> None:
    page = Page(write_report(written(tmp_path))[0].read_text())
    for words in (
        "selected on the validation split",
        "test/top1 0.8125",
        "kd sweep toys.yaml",
        "abc123",
        "cafe",
        "t.safetensors",
        "the loss is nan",
        "by the scheduler after epoch 2 with val/top1 0.2500",
        "1,702",
        "123,456",
        "0.9233 0.0252 3 +0.2000",
    ):
        assert words in page.text, words


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    text = write_report(written(tmp_path))[0].read_text()
    page = Page(text)
    tags = Counter(tag for tag, _ in page.tags)
    assert not tags.keys() & {"script", "link", "iframe", "object", "embed", "form"}
    assert tags["img"] >= 5
    for image in page.named("img"):
        assert str(image["src"]).startswith("data:image/png;base64,")
    assert not re.search(r"https?://|@import|url\(", re.sub(r"base64,[^\"]*", "", text))
    assert not [name for _, held in page.tags for name in held if name.startswith("on")]


def test_the_page_can_be_read_aloud(tmp_path: Path) -> None:
    page = Page(write_report(written(tmp_path))[0].read_text())
    assert page.named("html") == [{"lang": "en"}]
    assert all(image["alt"] for image in page.named("img"))
    assert all(cell["scope"] in ("col", "row") for cell in page.named("th"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels))
    names = {held.get("id") for _, held in page.tags}
    assert {held["aria-labelledby"] for _, held in page.tags if "aria-labelledby" in held} <= names
    assert len(page.named("table")) == len(page.named("caption"))


def test_a_label_is_words_and_never_a_tag(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    ranking = replace(
        RANKING,
        name=f'"{evil}',
        rows=[replace(ROWS[0], label=evil), *ROWS[1:]],
        failed=[Unfinished({evil: evil}, error=evil)],
        test={evil: 0.5},
    )
    text = write_report(written(tmp_path, ranking))[0].read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert evil in Page(text).text


def test_the_model_card_has_teacher_data_losses_numbers_command_and_commit() -> None:
    card = model_card(replace(RANKING, name="<b>"))
    for words in (
        "# Best student of sweep &lt;b>",
        "A `convnet`, trained on digits",
        "mean val/top1 0.9233, sd 0.0252, 3 seeds",
        "Against the control: +0.2000, p ",
        "Test, seen once: test/top1 0.8125",
        "1,702 parameters, 123,456 floating-point operations and 2 ms",
        "sha256 `d1935`",
        "Taught by teacher: `convnet`, cache `cafe`, val/top1 0.9700",
        "Loss `distill`: `kd`, weight 0.9, temperature 4.0.",
        "Loss `mid`: `mse`, weight 1.0, block1 to block3.",
        "`kd sweep toys.yaml`",
        "`abc123`",
    ):
        assert words in card, words


def test_the_same_sweep_makes_the_same_files_wherever_it_lies(tmp_path: Path) -> None:
    folder = written(tmp_path / "here")
    first = {path.name: path.read_bytes() for path in write_report(folder)}
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    again = write_report(tmp_path / "there" / folder.relative_to(tmp_path / "here"))
    assert {path.name: path.read_bytes() for path in again} == first
    assert {"responses.png", "parallel.png", "costs.png", "curves.png"} <= first.keys()
    assert "bounds.png" not in first


def test_the_last_pictures_that_the_best_run_invented_are_shown(tmp_path: Path) -> None:
    folder = written(tmp_path)
    assert not (folder / "samples.png").exists()
    drawn = {}
    for run, epoch in (("kd-2", 2), ("kd-2", 10), ("kd-1", 11)):  # kd-2 is the best student's
        file = epoch_grid(tmp_path / "runs" / run, epoch)
        file.parent.mkdir(exist_ok=True)
        drawn[run, epoch] = png(np.full((3, 48, 64), epoch, dtype=np.uint8))
        put(file, drawn[run, epoch])
    paths = write_report(folder)
    assert (folder / "samples.png") in paths
    assert (folder / "samples.png").read_bytes() == drawn["kd-2", 10]
    text = paths[0].read_text()
    assert base64.b64encode(drawn["kd-2", 10]).decode() in text
    assert "--width: 384px" in text  # six times their own


def test_a_sweep_without_control_or_seeds_still_has_its_page(tmp_path: Path) -> None:
    alone = replace(RANKING, rows=[row("base", [0.5])], failed=[], stopped=[], teachers=[])
    page = Page(write_report(written(tmp_path, alone))[0].read_text())
    assert "There is no control among the configurations" in page.text
    assert "every trial was trained to its end" in page.text
    assert "nan" not in page.text


def test_a_line_of_parallel_coordinates_goes_through_the_values_of_its_row() -> None:
    figure = parallel_coordinates(ROWS, metric="val/top1")
    assert figure is not None
    axis = figure.axes[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == [
        "losses.distill.loss",
        WEIGHT,
        WIDTH,
        "val/top1",
    ]
    lines = [line.get_ydata() for line in axis.lines if len(line.get_ydata()) == 4]
    control, *others = lines  # the best are drawn last, on top
    assert control[0] == pytest.approx(2 / 3)  # kd, mse, no distillation, w2
    assert [math.isnan(height) for height in control] == [False, True, True, False]
    assert others[-1] == pytest.approx([0, 0, 0, 1])
    assert parallel_coordinates([ROWS[0]], metric="val/top1") is None


def test_the_metric_is_drawn_over_every_cost() -> None:
    costly = replace(ROWS[0], cost=Cost(parameters=10, flops=20, latency_s=0.03))
    figure = over_costs([costly, ROWS[-1]], RANKING.teachers, metric="val/top1")
    drawn = [[line.get_xydata().tolist() for line in axis.lines] for axis in figure.axes]
    for (student, control, teacher), places in zip(
        drawn, [(10, 1702), (20, 123_456), (30, 2)], strict=True
    ):
        assert student[0] == pytest.approx([places[0], costly.mean])
        assert control[0] == pytest.approx([places[1], ROWS[-1].mean])
        assert teacher[0] == pytest.approx([places[1], 0.97])
