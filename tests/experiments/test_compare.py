"""The comparison: models of equal size, runs that resume, tables, and the numbers in results/."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import grassmann
from charlm import training
from experiments import compare, mixers, tasks
from experiments.compare import (
    ATTENTION,
    GRASSMANN,
    QUESTIONS,
    Laboratory,
    Question,
    Row,
    Trial,
    count_params,
)
from experiments.texts import Text

TINY = {
    "context": 8,
    "n_layer": 2,
    "d_model": 8,
    "rank": 5,
    "n_head": 2,
    "batch_size": 4,
    "iters": 3,
    "vocab_size": 11,
    "data": "text",
    "eval_every": 20,
}
TEXT = "".join(f"{k} green bottles on the wall, and if {k % 7} should fall\n" for k in range(50))
RESULTS = Path(compare.__file__).with_name("results")


def trial_with(**settings) -> Trial:
    return Trial(compare.BASE | TINY | settings)


def text_of(tokens, sizes=(10, 10), vocab_size: int = 11, name: str = "text") -> Text:
    n_val, n_test = sizes
    parts = tokens[: -n_val - n_test], tokens[-n_val - n_test : -n_test], tokens[-n_test:]
    return Text(name, name, vocab_size, [*range(vocab_size)], *parts, 1.0)


@pytest.fixture
def lab(tmp_path) -> Laboratory:
    """Of a text "first"; other texts are added by the tests."""
    new = Laboratory(tmp_path / "runs.jsonl", "first")
    new.texts["first", 0] = text_of(np.zeros(99, int), name="first")
    return new


def settle(lab, question, loss=lambda trial: 1.0) -> tuple[list[Row], list[Trial]]:
    """Finish what a question needs, with this validation loss; the test loss is its negative."""
    asked = []
    rows = lab.answer(question)
    while lab.missing:
        for _, trial, _ in lab.missing.values():
            asked.append(trial)
            lab.finished[compare.digest(trial.spec)] = {
                "spec": trial.spec,
                "curve": [[trial.training.iters, loss(trial)]],
                "test": -loss(trial),
            }
        lab.missing.clear()
        rows = lab.answer(question)
    return rows, asked


# ---- models of equal size ------------------------------------------------------------------------


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.title)
def test_all_models_of_a_question_have_the_same_size(lab, question):
    lab.texts[question.text or ("first", 0)] = text_of(np.zeros(99, int), vocab_size=65)
    settings = {"vocab_size": 65, "data": "text", "eval_every": 1} | question.settings
    plain = Trial(compare.BASE | settings)
    rows, _ = settle(lab, question)
    assert [row.label for row in rows] == [label for label, _ in question.models]
    assert [len(row.results) for row in rows] == [*np.broadcast_to(question.seeds, len(rows))]
    for (_, changes), row in zip(question.models, rows, strict=True):
        run = Trial(row.results[0]["spec"])
        as_is = Trial(compare.BASE | settings | changes)
        optional = {"memory", "larger"}
        unknown = as_is.spec.keys() - plain.spec.keys() - optional
        assert unknown == set(), row.label
        names = {name.split(".")[-1] for name in grassmann.param_shapes(run.config)}
        assert names >= {*changes.get("larger", ())}, row.label
        if question.same_size:
            assert count_params(run) == pytest.approx(count_params(plain), rel=0.02), row.label
            same = {"d_model": 8, "d_ff": 8}  # nothing else is changed
            assert replace(run.config, **same) == replace(as_is.config, **same)


def test_rates_are_those_of_another_question_where_it_says_so(lab):
    """And a rate is chosen on the validation part, whatever the test part says."""
    lab.texts["other", 0] = text_of(np.zeros(99, int), name="other")
    first = Question(1, "", "", [GRASSMANN])
    question = Question(2, "", "", [GRASSMANN], text=("other", 0), rates_of=first, seeds=2)
    _, asked = settle(lab, question, lambda trial: (trial.training.lr - 4e-3) ** 2)
    assert [(trial.spec["data"], trial.training.lr) for trial in asked] == [
        ("first", 2e-3),
        ("first", 4e-3),
        ("first", 8e-3),
        ("other", 4e-3),
        ("other", 4e-3),
    ]


# ---- one run -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixer": "outer product"},
        {"mixer": "attention", "larger": ("W_qkv", "W_out")},
        {"dropout": 0.2},
    ],
)
def test_a_run_is_training_by_hand(changes):
    """The same losses to the last bit: start, batches, rate, clipping, optimiser, validation."""
    tokens = np.random.default_rng(1).integers(0, 11, 900)
    text, trial = text_of(tokens, (60, 40)), trial_with(iters=40, seed=3, **changes)
    result = compare.train(("label", trial, text))
    config, pace = trial.config, training.Training(40, 4, warmup_iters=4, seed=3)
    params = grassmann.init_params(config, 3)
    mixers.scale_features(params)
    for name in params:
        if name.endswith(changes.get("larger", ())):
            params[name] /= 0.02 * math.sqrt(8)  # N(0, 1/8), W_out N(0, 1/32), not N(0, 0.02²)
    optimizer = grassmann.adamw_init(params)
    curve = []
    for step in range(40):
        training.train_step(grassmann, params, config, pace, optimizer, step, tokens[:800])
        if step in (19, 39):
            curve.append([step + 1, grassmann.validation_loss(params, config, tokens[800:860])])
    assert result["curve"] == curve
    assert result["validation"] == curve[-1][1]
    assert result["test"] == grassmann.validation_loss(params, config, tokens[860:])
    assert result["parameters"] == sum(a.size for a in params.values())


def test_a_loss_that_is_not_finite_ends_a_run(monkeypatch):
    monkeypatch.setattr(compare.Learner, "step", lambda self: math.inf)
    text = text_of(np.arange(900) % 11, (60, 40))
    diverged = compare.train(("label", trial_with(iters=40), text))
    assert diverged["curve"][-1][0] == 1
    assert compare.final(diverged) == math.inf


@pytest.mark.parametrize(
    "change",
    [
        {"grad_clip": 2.0},
        {"offsets": ((1,), (2,))},
        {"memory": True},
        {"larger": ("W_red",)},
        {"data": "another text"},
    ],
)
def test_other_settings_are_another_run(change):
    spec = trial_with(**change).spec
    assert compare.digest(spec) != compare.digest(trial_with().spec)
    assert compare.digest(Trial(json.loads(json.dumps(spec))).spec) == compare.digest(spec)


# ---- all runs ------------------------------------------------------------------------------------

ONE = Question(1, "One", "Does it run?", [ATTENTION, GRASSMANN], seeds=2, ngrams=True)
TWO = Question(4, "Two", "Another product?", [ATTENTION, ("sum", {"mixer": "sum"})])
FAR = Question(
    8,
    "Far",
    "How far?",
    [(f"{task}, far", {"data": task}) for task in tasks.TASKS],
    {"vocab_size": 32, "context": 128, "batch_size": 2, "iters": 2},
    tasks=True,
    rates=(4e-3,),
)


@pytest.fixture
def program(tmp_path, monkeypatch, capsys):
    """Run main() on a small text, with tiny models and three questions: the labels it trained."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr(compare, "BASE", compare.BASE | TINY)
    monkeypatch.setattr(compare, "QUESTIONS", [ONE, TWO, FAR])

    def run(*options, jobs: int = 1, error: int = 0) -> list[str]:
        fixed = ["--data", tmp_path / "text.txt", "--out", run.out, "--jobs", jobs]
        trained = []

        def counted(what: tuple, train=compare.train) -> dict:
            result = train(what)
            trained.append(what[0])
            return result

        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["compare", *map(str, [*fixed, *options])])
            patch.setattr(compare, "train", counted if jobs == 1 else compare.train)
            try:
                assert compare.main() is None and not error
            except SystemExit as stop:
                assert stop.code == error
        run.printed, run.error = capsys.readouterr()
        return sorted(trained)

    run.out = tmp_path / "out"
    run.file = run.out / "runs.jsonl"
    run.lines = lambda: sorted(run.file.read_text(encoding="utf-8").splitlines())
    run.saved = lambda: (run.out / "compare.md").read_text(encoding="utf-8")
    return run


def test_from_text_to_tables_and_figures(program):
    program()
    saved = program.saved()
    assert saved in program.printed
    assert "`python -m experiments.compare --data" in saved
    assert re.findall(r"^## (.*)$", saved, re.MULTILINE) == ["1. One", "4. Two", "8. Far"]
    assert [file.name for file in program.out.glob("*.png")] == ["compare_1.png"]
    timing = json.loads((program.out / "timing.json").read_text(encoding="utf-8"))
    assert timing["machine"] in saved
    for question in timing["ms"].values():
        for ms in question:
            assert f"| {ms:.1f} |" in saved
    elsewhere = {"machine": "another processor", "ms": {}}  # whose times are not mixed with ours
    (program.out / "timing.json").write_text(json.dumps(elsewhere), encoding="utf-8")
    assert program() == []
    assert "\nanother processor.\n" in program.saved()
    assert "| 1,436 |  |  |" in program.saved()


def test_resume_trains_what_is_missing_and_nothing_else(program):
    everything = program("--only", 1, 4)
    content = program.file.read_text(encoding="utf-8")
    table = program.saved()
    counts = [everything.count(f"{label}, seed 1") for label in ("attention", "Grassmann", "sum")]
    assert counts == [1, 1, 0]  # two seeds in question 1, one in question 4
    assert everything.count("attention, seed 0") == 0  # the run that its rate was found in
    assert program("--only", 1, 4) == []
    assert program.saved() == table
    gone = next(line for line in program.lines() if '"label": "sum, lr' in line)
    program.file.write_text(content.replace(gone + "\n", ""), encoding="utf-8")
    assert program("--only", 4, jobs=0) == []
    assert "| sum |" not in program.saved()  # what is finished
    assert program("--only", 1, 4) == [json.loads(gone)["label"]]
    assert sorted(content.splitlines()) == program.lines()
    program.file.write_text(content.replace(gone, gone[:99]), encoding="utf-8")
    program("--only", 1, 4, error=2)
    assert f"line {content.splitlines().index(gone) + 1} is damaged, delete it" in program.error


@pytest.mark.slow
def test_several_processes_and_one_get_the_same(program, monkeypatch):
    """And after an error no process is left."""
    monkeypatch.setattr(compare, "best_lr", lambda ask, rates, spacing, enough: 1e-3)
    program("--only", 1)
    lines = program.lines()
    program.file.unlink()
    program("--only", 1, jobs=2)
    assert program.lines() == lines
    assert len(lines) == 5
    program.file.unlink()

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compare.os, "fsync", full)
    program("--only", 4, jobs=2, error=2)
    assert program.error.count("No space left") == 1
    assert compare.multiprocessing.active_children() == []


ENDLESS = """  # two runs, in two processes, as a program of its own
from experiments import compare

compare.BASE |= {"context": 8, "n_layer": 1, "d_model": 8, "rank": 4, "iters": 10**9}
compare.QUESTIONS = [compare.Question(1, "", "", [compare.ATTENTION, compare.GRASSMANN])]
compare.best_lr = lambda ask, rates, spacing, enough: 1e-3
compare.main()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="signals, /proc")
@pytest.mark.parametrize("victim", ["all", "parent"])
def test_stopped_from_outside(tmp_path, victim):
    """Ctrl-C in a terminal reaches all processes, a signal from elsewhere only one."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    options = ["--data", tmp_path / "text.txt", "--out", tmp_path, "--only", "1", "--jobs", "2"]
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS, *options],
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        cwd=RESULTS.parent.parent,
    ) as program:
        try:
            children = Path(f"/proc/{program.pid}/task/{program.pid}/children")
            workers = []
            while len(workers) < 2:
                workers = [
                    int(pid)
                    for pid in children.read_text().split()
                    if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
                ]
            time.sleep(0.5)
            (os.killpg if victim == "all" else os.kill)(program.pid, signal.SIGINT)
            _, error = program.communicate(timeout=30)  # until no process is left that could write
        finally:
            program.kill()  # its processes end with it
    assert program.returncode == 130
    assert re.fullmatch("\\s*stopped; .*\n", error)


@pytest.mark.parametrize(
    "options, reason",
    [
        ("--only 19", "--only"),
        ("--jobs -1", "--jobs"),
        ("--data empty.txt", "text has 0 characters"),
    ],
)
def test_options_that_make_no_sense_get_one_line(program, options, reason, tmp_path, monkeypatch):
    (tmp_path / "empty.txt").touch()
    monkeypatch.chdir(tmp_path)
    program(*options.split(), error=2)
    assert program.error.count("\n") == 1
    assert reason in program.error


# ---- answers and tables --------------------------------------------------------------------------


@pytest.mark.parametrize("optimum, best", [(2.2e-3, 2e-3), (3e-2, 3.2e-2), (3e-4, 2.5e-4)])
def test_best_learning_rate(optimum, best):
    """The best of the grid; beyond its edges, the grid grows."""
    rates = compare.LEARNING_RATES
    tried = []

    def ask(lr: float) -> dict:
        tried.append(lr)
        loss = math.nan if lr > 0.05 else math.log(lr / optimum) ** 2
        return {"curve": [[50, loss]], "spec": {"iters": 50}}

    assert compare.best_lr(ask, rates) == pytest.approx(best)
    assert len(tried) == len(set(tried))
    nearest = rates[0] if optimum < 2.5e-3 else rates[1]
    assert compare.best_lr(ask, rates, enough=9.0) == nearest
    assert compare.best_lr(lambda lr: ask(lr) if lr != 4e-3 else None, rates) is None
    finer = compare.best_lr(ask, (2.83e-3, 4e-3, 5.66e-3), math.sqrt(2))
    assert finer == pytest.approx(optimum, rel=0.2)


def test_what_the_table_says():
    def row(label: str, ms: float, *ends: float, step: int = 100) -> Row:
        more = {"spec": {"iters": 100, "lr": 0.004}, "parameters": 1234, "bytes_per_token": 2.0}
        return Row(label, [{"curve": [[step, 9.9]], "test": end, **more} for end in ends], ms)

    attention, slow = row("attention", 100.0, 1.5), row("slow", 160.0, 1.4, 1.2)
    counted = Row("4-gram", attention.results)
    question = Question(6, "", "", [], text=("bible", 100))
    first, second, third = compare.loss_table(question, [attention, slow], counted)
    assert third == {
        "model": "slow",
        "learning rate": "0.004",
        "seeds": 2,
        "parameters": "1,234",
        "ms per step": "160.0",
        "test loss, nats per token": "1.300 ± 0.141",
        "bits per byte": "0.938",
        "validation": "9.900",
        "gap to attention": "-18.1%",
    }  # exp(1.3 - 1.5) - 1, and attention has one seed
    assert [*first.values()] == ["4-gram", "", "", "1.500", "1.082", "9.900", "", "", "+0.0%"]
    assert second["gap to attention"] == ""
    # with standard deviations of 0.14
    for two, gap in (((1.4, 1.6), "+35.0%, level"), ((1.7, 1.9), "+82.2%")):
        rows = [row("one", 1.0, 1.1, 1.3), row("b", 1.0, *two)]
        _, second = compare.loss_table(question, rows)
        assert second["gap to one"] == gap
    diverged = row("diverged", 30.0, 0.9, step=3)
    first, second = compare.loss_table(Question(1, "", "", []), [diverged, attention])
    assert first["test loss, nats per character"] == "inf"
    assert second["gap to diverged"] == "+nan%"


# By which runs.jsonl knows its texts, and how many different tokens they have.
TEXTS = {
    ("shakespeare", 0): ("86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed", 65),
    (None, 0): ("2a95af4ac93f5b719944030ce3769070ddf827d847cba42192afa8da989e5dc4", 103),
    ("bible", 0): ("b5c4940bcfeee072c0935b5200d0f9d88a00a0199cb0961d16133458fcdfae5d", 63),
    ("shakespeare", 1024): (
        "fbb124daa102542530a51351947ee3802c29af34f529221ba49df174c6ade29d",
        1024,
    ),
    ("bible", 4096): ("f5ce40dd63dd80f29a136fbd169d6f321644def5f9520ed4fba07f0cc80512ed", 4096),
}
HEAD, *SECTIONS = (RESULTS / "compare.md").read_text(encoding="utf-8").strip().split("\n\n## ")


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.partition("\n")[0])
def test_the_tables_in_results_follow_from_the_runs(tmp_path, monkeypatch, section):
    """Every number; shares of right answers once more by hand."""
    shutil.copy(RESULTS / "runs.jsonl", tmp_path)
    lab = Laboratory(tmp_path / "runs.jsonl", "shakespeare")
    lab.texts = {
        which: replace(text_of(np.zeros(99, int), vocab_size=size), sha256=sha256)
        for which, (sha256, size) in TEXTS.items()
    }
    (question,) = (q for q in QUESTIONS if section.startswith(f"{q.number}. {q.title}\n\n{q.asks}"))
    rows = lab.answer(question)
    assert not lab.missing and len(rows) == len(question.models)
    assert compare.read_times(RESULTS / "timing.json")["machine"] in HEAD
    if not question.tasks:
        monkeypatch.setattr(compare, "machine", lambda: "no machine to measure on")
        compare.add_times(rows, None, RESULTS / "timing.json")
    counted = lab.counting(question) if question.ngrams else None
    table = tasks.table(rows) if question.tasks else compare.loss_table(question, rows, counted)
    assert section.endswith("\n\n" + compare.markdown(table))
    for cells, row in zip(table, rows if question.tasks else [], strict=question.tasks):
        shares = np.mean([run["test"] for run in row.results], 0)
        assert [cell.split()[0] for cell in [*cells.values()][3:]] == [
            f"{100 * share:.0f}%" for share in shares
        ]


def table(text: str, corner: str = ".*") -> list[list[str]]:
    """The rows of the first table with this first cell, heading first."""
    heading, _, *rows = re.search(rf"^\| {corner} \|.*\n(?:\|.*\n?)+", text, re.MULTILINE)[
        0
    ].splitlines()
    return [[each.strip() for each in line[1:-1].split("|")] for line in (heading, *rows)]


def results(start: str | tuple[str, ...]) -> list[list[str]]:
    """The table of the one section of compare.md that starts so."""
    (section,) = (each for each in SECTIONS if each.startswith(start))
    return table(section)


def loss(label: str, *sections: str | tuple[str, ...]) -> str:
    """Test loss of a model, without its spread, in the first of these sections that has it."""
    return next(
        row[3].split()[0] for section in sections for row in results(section) if row[0] == label
    )


def page(name: str) -> str:
    return (RESULTS.parent.parent / name).read_text(encoding="utf-8")


def test_the_losses_that_the_laboratory_shows_are_those_of_the_results():
    """A row of a model stands in compare.md, without some of its columns."""
    known = [{*row} for section in SECTIONS for row in table(section)]
    text = page("experiments/README.md")
    for start in re.finditer(r"^\| (model \| (learning|test)|model, by)", text, re.MULTILINE):
        _, *rows = table(text[start.start() :])
        for cells in rows:
            assert any({*cells} <= row for row in known), cells


def test_a_setting_that_the_laboratory_shows_has_the_losses_of_the_models_above():
    (_, _, *models), *rows = table(page("experiments/README.md"), "setting .*")
    for setting, seeds, *cells in rows:
        told = {row[0]: row[-6].split() for row in results(f"{setting}\n")}
        assert seeds == ("3" if told["Grassmann"][1:] else "1"), setting
        assert cells == [told.get(model, [""])[0] for model in models], setting


TAPPED = "attention with taps and our gate"
CONVOLUTION = "convolution with our gate"
PERCENTAGES = [  # of the first model against the second
    ("README.md", r"perplexity is (\d+)% below", "Grassmann", "attention"),
    ("README.md", r"first weights\) is (\d+)% behind", TAPPED, "Grassmann"),
    ("README.md", r"behind, a convolution (\d+)%", CONVOLUTION, "Grassmann"),
    ("experiments/README.md", r"perplexity (\d+)% lower", "Grassmann", "attention"),
    ("experiments/README.md", r"parts is (\d+)% behind", TAPPED, "Grassmann"),
]


@pytest.mark.parametrize("name, sentence, model, other", PERCENTAGES)
def test_the_percentages_of_a_page_are_those_of_the_results(name, sentence, model, other):
    losses = [float(loss(label, "1. ", "2. ", "3. ")) for label in (model, other)]
    gap = math.exp(losses[0] - losses[1]) - 1
    assert f"{100 * abs(gap):.0f}" == re.search(sentence, page(name))[1]


def test_the_page_on_the_dispute_has_our_losses_and_gaps():
    shown = {model: cells for model, *cells in table(page("docs/dispute.md"), "model")[1:]}
    for k, question in enumerate(q for q in QUESTIONS if q.number == 10):
        for section in SECTIONS:
            if section.startswith(f"10. {question.title}\n") and "gap to attention" in section:
                for model, *cells in table(section)[1:]:
                    assert shown[model][2 * k : 2 * k + 2] == [cells[2], cells[-1]]


def test_how_far_ahead_and_behind_the_readme_says():
    sentence = r"(\d+) to (\d+)% ahead\b.*? (\d+) to (\d+)% behind"
    rows = table(page("docs/dispute.md"), "model")[2:]
    for k, told in enumerate(re.findall(sentence, page("README.md"))):
        gaps = sorted(float(row[2 * k + 2][:-1]) for row in rows if " x " not in row[0])
        assert [f"{abs(gaps[n]):.0f}" for n in (1, 0, 2, 3)] == [*told]


def test_the_page_on_the_dispute_has_the_differences_to_cite():
    told = table(page("docs/dispute.md"), "test loss of")[1:]
    assert told == table(page("experiments/results/cite.md"), "test loss of")[1:]


def test_the_gaps_of_others_follow_from_their_losses():
    for *_, attention, ours, gap in table(page("docs/dispute.md"), "who .*")[1:]:
        if gap:
            expected = 100 * (float(ours) / float(attention) - 1)
            assert gap == f"{expected:+.1f}%"


@pytest.mark.parametrize(
    "corner, section",
    [("contestant", "1. "), ("features", "2. "), ("layer", "10. The dispute\n")],
)
def test_the_losses_in_the_tutorial_are_those_of_the_results(corner, section):
    for model, *_, told in table(page("tutorial.md"), corner)[1:]:
        assert told == loss(model, section)


def test_the_losses_on_the_bible_are_those_of_the_results():
    (_, *models), *rows = table(page("tutorial.md"), "King James Bible")
    for setting, *cells in rows:
        size = setting.removesuffix(", 2,000 steps")
        for model, told in zip(models, cells, strict=True):
            assert told == loss(model, (f"5. {size}\n", f"5. {size}, rates"))


@pytest.mark.parametrize(
    "name, corner, section",
    [("tutorial.md", r"model \| 1 to 2", "8. "), ("docs/bivector.md", r"model \| 2 keys", "9. ")],
)
def test_accuracies_on_a_page_are_those_of_the_results(name, corner, section):
    (_, *groups), *rows = table(page(name), corner)
    names, *known = results(section)
    told = {row[1]: dict(zip(names, row, strict=True)) for row in known}
    for model, *cells in rows:
        assert cells == [told[model][group].split()[0] for group in groups]
