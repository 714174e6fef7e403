"""compare.py: products in place of the wedge, partners at words and lines, models of equal size, runs that
resume, several at a time, tables, the far token.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from finite_differences import check_gradients, ordinary_params, tiny_config

import compare
import grassmann
import train_char
import variants
from compare import ASK, QUESTIONS, TASKS, Answer, Question, accuracy, count_params, matched
from variants import PRODUCTS, swapped

OTHERS = [name for name in PRODUCTS if name != "wedge"]
TINY = {"context": 8, "n_layer": 2, "d_model": 8, "rank": 5, "batch_size": 4, "n_head": 2, "iters": 3}
TEXT = "".join(f"{k} green bottles hanging on the wall, and if {k % 7} of them should fall\n" for k in range(40))
ONE = Question(1, "One", "Does it run?", [compare.ATTENTION, compare.GRASSMANN], seeds=3)
TWO = Question(5, "Two", "Does it run with another product?", [compare.ATTENTION, ("sum", {"product": "symmetric"})])
PLOT = compare.plot
LARGE = Question(1, "Large", "Is it left out?", [compare.ATTENTION], {"n_layer": 3}, large=True)


# ---- products in place of the wedge -------------------------------------------------------------------


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("leading", [(7,), (2, 3)])
@pytest.mark.parametrize("r", [5, 6])
def test_gradients_of_the_products(rng, name, leading, r):
    u, v = rng.standard_normal((2, *leading, r))
    weights = rng.standard_normal((*leading, r * (r - 1) // 2))
    forward, backward, _ = PRODUCTS[name]

    def loss():
        return float((forward(u, v)[0] * weights).sum())

    du, dv = backward(weights, forward(u, v)[1])
    check_gradients(name, loss, {"u": u, "v": v}, {"u": du, "v": dv})


def test_the_products_are_what_they_are_called():
    u, v = np.array([1.0, 2, 3, 4, 5]), np.array([10.0, 20, 30, 40, 60])
    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    expected = {
        "symmetric": [u[i] * v[j] + u[j] * v[i] for i, j in pairs],
        "elementwise": [10, 40, 90, 160, 300, 0, 0, 0, 0, 0],
        "concatenation": [1, 2, 3, 4, 5, 10, 20, 30, 40, 60],
    }
    for name in OTHERS:
        np.testing.assert_array_equal(PRODUCTS[name][0](u, v)[0], expected[name])


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_multiplies_by_the_product_in_all_threads(name):
    """Loss and gradients are those of the product, the rows of W_plu beyond its coordinates get no gradient,
    and count_params counts what does."""
    config, (x, y) = tiny_config(rank=6), np.random.default_rng(1).integers(0, 11, (2, 6, 9))
    params = ordinary_params(config)
    wedge = grassmann.loss_and_grads(params, config, x, y)[0]
    with swapped(variants.multiply_by(name)):
        loss, grads = grassmann.loss_and_grads(params, config, x, y, threads=2)
        np.testing.assert_allclose(loss, grassmann.loss_and_grads(params, config, x, y)[0], rtol=1e-12)
        some = {key: params[key] for key in ("E", "blocks.0.mix.W_red", "blocks.1.mix.W_plu", "blocks.1.mix.taps")}
        check_gradients(
            f"model, {name}", lambda: grassmann.loss_and_grads(params, config, x, y, threads=2)[0],
            some, {key: grads[key] for key in some}, entries=8,
        )  # fmt: skip
    assert abs(loss - wedge) > 1e-3
    assert count_params(config, name) == sum(np.count_nonzero(g) for g in grads.values())


def test_the_functions_are_back_after_an_error():
    functions = variants.multiply_by("elementwise") | variants.look_back_to(("word",), VOCAB)
    before = {name: getattr(grassmann, name) for name in functions}
    with pytest.raises(ZeroDivisionError), swapped(functions):
        assert grassmann.plucker_forward is variants.elementwise_forward
        assert grassmann.plucker_backward is variants.elementwise_backward
        assert all(getattr(grassmann, name) is not before[name] for name in functions)
        raise ZeroDivisionError
    assert {name: getattr(grassmann, name) for name in functions} == before
    assert variants.multiply_by("wedge").items() <= before.items()


# ---- partners where words and lines end ---------------------------------------------------------------

VOCAB = sorted(map(ord, "\n abcdefgh"))
NAMES = "word", "second word", "line"


def tokens_of(text):
    return np.array([[VOCAB.index(ord(character)) for character in text]])


def test_where_words_and_lines_end():
    """Character by character what a reader would point at, who has read up to and with it."""
    text = "a bc\n\nde  f gh\na"
    word, second, line = (rows[0] for rows in variants.landmark_rows(tokens_of(text), NAMES, VOCAB))
    for t in range(len(text)):
        read = text[: t + 1]
        closed = [k for k in range(t) if not read[k].isspace() and read[k + 1].isspace()]
        lines = [k for k in range(t) if read[k] != "\n" and read[k + 1] == "\n"]
        assert word[t] == (closed[-1] + 1 if closed else 0), t
        assert second[t] == (closed[-2] + 1 if len(closed) > 1 else 0), t
        assert line[t] == (lines[-1] + 1 if lines else 0), t
    assert [text[t - 1] for t in (word[-1], second[-1], line[-1])] == ["h", "f", "h"] and max(word) == len(text) - 2


def test_every_text_of_a_batch_has_its_own_landmarks():
    text = tokens_of("ab cd\nef g")
    together = variants.landmark_rows(np.concatenate([text, text[:, ::-1], text]), NAMES, VOCAB)
    for alone, rows in zip(variants.landmark_rows(text, NAMES, VOCAB), together, strict=True):
        np.testing.assert_array_equal(rows[0], alone[0])
        np.testing.assert_array_equal(rows[2], np.where(alone[0] > 0, alone[0] + 2 * text.size, 0))


@pytest.fixture
def with_landmarks():
    """config, params, and texts (6, 16) in which every landmark occurs; grassmann.py has landmarks meanwhile."""
    config = tiny_config(vocab_size=len(VOCAB), context=16)
    tokens = np.random.default_rng(1).integers(0, len(VOCAB), (6, 17))
    tokens[:, 4::5], tokens[:, 9] = 1, 0
    with swapped(variants.look_back_to(NAMES, VOCAB)):
        params = ordinary_params(config)
        for name, shape in grassmann.param_shapes(config).items():
            if name.endswith("taps"):
                params[name] = np.random.default_rng(2).normal(size=shape)
        yield config, params, tokens


def test_gradients_with_landmarks(with_landmarks):
    config, params, tokens = with_landmarks
    x, y = tokens[:, :-1], tokens[:, 1:]
    loss, grads = grassmann.loss_and_grads(params, config, x, y, threads=2)
    np.testing.assert_allclose(loss, grassmann.loss_and_grads(params, config, x, y)[0], rtol=1e-12)
    some = {key: params[key] for key in ("E", *(key for key in params if key.endswith(("W_red", "taps"))))}
    check_gradients(
        "model, landmarks", lambda: grassmann.loss_and_grads(params, config, x, y)[0],
        some, {key: grads[key] for key in some}, entries=24,
    )  # fmt: skip
    assert all(np.abs(grads[key]).min(1).all() for key in grads if key.endswith("taps"))  # all in use
    assert count_params(config, "wedge", NAMES) == sum(grads[key].size for key in grads)


def test_no_landmark_reads_the_future(with_landmarks):
    config, params, tokens = with_landmarks
    before = grassmann.forward(params, config, tokens[:, :16])
    for t in range(1, 16):
        for other in (0, 1, 5):  # a new line, a space, a letter
            changed = tokens[:, :16].copy()
            changed[:, t] = other
            after = grassmann.forward(params, config, changed)
            np.testing.assert_array_equal(after[:, :t], before[:, :t])


def test_landmarks_are_partners_with_taps_of_their_own(with_landmarks, rng):
    """s_t as the formula says, at every t; without their taps the model is the one without landmarks."""
    config, params, tokens = with_landmarks
    seen = {}

    def watched(z, taps, offsets, normalize, real=grassmann.partner_forward):
        seen["z"], seen["taps"], (seen["s"], cache) = z, taps, real(z, taps, offsets, normalize)
        return seen["s"], cache

    with swapped({"partner_forward": watched}):
        grassmann.forward(params, config, tokens)
    z, taps, offsets = seen["z"], seen["taps"], config.offsets[-1]
    assert len(taps) == len(offsets) + 3
    rows = variants.landmark_rows(tokens, NAMES, VOCAB)
    for b, t in np.ndindex(tokens.shape):
        s = sum((w * z[b, t - delta] for w, delta in zip(taps, offsets, strict=False) if t >= delta), np.zeros(4))
        places = [(w, found[b, t] - 1) for w, found in zip(taps[len(offsets) :], rows, strict=True) if found[b, t]]
        s = s + sum(w * z.reshape(-1, 4)[place] for w, place in places)
        np.testing.assert_allclose(seen["s"][b, t], s, rtol=1e-12, atol=1e-12)


# ---- models of equal size -----------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [65, 103])
@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.title)
def test_all_models_of_a_question_have_the_same_size(question, vocab_size):
    settings = compare.BASE | question.size
    target = count_params(compare.model(settings, vocab_size))
    assert question.large or 0.65e6 < target < 0.95e6
    for label, overrides in question.rows:
        spec = compare.make_spec(settings, overrides, vocab_size, "text", question.same_size)
        config = compare.config_of(spec)
        if question.same_size:
            assert abs(count_params(config, spec["product"], spec["landmarks"]) / target - 1) < 0.02, label
        else:
            assert config == compare.model(settings | overrides, vocab_size)
        assert config.d_model % config.n_head == 0, label
        assert replace(config, d_model=8, d_ff=8) == replace(
            compare.model(settings | overrides, vocab_size), d_model=8, d_ff=8
        ), f"{label}: something else than the width was changed"


@pytest.mark.parametrize("label, overrides", compare.RECALL_ROWS)
def test_all_models_of_question_6_have_the_same_size(label, overrides):
    settings = compare.BASE | compare.RECALL_SIZE
    config = compare.config_of(compare.make_spec(settings, overrides, compare.TOKENS, "recall"))
    assert abs(count_params(config) / count_params(compare.model(settings, compare.TOKENS)) - 1) < 0.02


def test_the_first_grassmann_model_is_the_one_that_train_char_trains(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    args = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path), "--dropout", "0"]
    config = train_char.runs.make_run(train_char.build_parser().parse_args(args), None).config
    assert compare.GRASSMANN in QUESTIONS[1].rows and compare.model(compare.BASE, config.vocab_size) == config
    assert matched(config, count_params(config)) == config


@pytest.mark.parametrize("mixer", ["grassmann", "attention"])
def test_matched_finds_sizes_far_from_its_own(mixer):
    config = tiny_config(mixer=mixer, positions=True)
    for target in (5_000, 40_000, 1_000_000):
        assert abs(count_params(matched(config, target)) / target - 1) < 0.02


@pytest.mark.parametrize("same_size", [True, False])
def test_a_question_may_leave_sizes_as_they_are(same_size):
    asked = []
    question = replace(TWO, rows=[("default", {}), ("wide", {"d_ff": 999})], same_size=same_size)
    study = SimpleNamespace(quick=False, seeds=1, text="", vocab=VOCAB)
    compare.answer(study, question, lambda label, spec: asked.append(spec))
    assert {spec["d_ff"] for spec in asked if spec["d_model"] == 128} == ({256} if same_size else {256, 999})


def test_W_red_scale_is_its_standard_deviation():
    spec = compare.make_spec(compare.BASE, {"W_red_scale": 0.02}, 60, "text")
    plain, changed = compare.begin(spec | {"W_red_scale": None})[0], compare.begin(spec)[0]
    for name, value in changed.items():
        if name.endswith("W_red"):
            assert value.std() == pytest.approx(0.02, rel=0.1)
        else:
            np.testing.assert_array_equal(value, plain[name])


# ---- runs ---------------------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path, monkeypatch, capsys):
    """Run compare.py's main() on a small text, with tiny models, three questions and no figure.

    Returns the labels of the runs that it trained, in alphabetic order.
    """
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr(compare, "BASE", compare.BASE | TINY)
    monkeypatch.setattr(compare, "QUESTIONS", [ONE, LARGE, TWO])
    monkeypatch.setattr(compare, "RECALL_SIZE", {"context": 16, "batch_size": 2, "iters": 2})
    monkeypatch.setattr(compare, "RECALL_ROWS", [compare.ATTENTION, compare.GRASSMANN])
    monkeypatch.setattr(compare, "LEARNING_RATES", (1e-3, 4e-3))
    monkeypatch.setattr(compare, "TIMED", 2)
    monkeypatch.setattr(compare, "plot", lambda *how: None)
    trained, perform = [], compare.perform

    def counted(study, label, spec):
        perform(study, label, spec)
        trained.append(label)

    monkeypatch.setattr(compare, "perform", counted)

    def run(*options, jobs=1):
        trained.clear()
        fixed = ["--data", tmp_path / "text.txt", "--out", tmp_path / "out", "--jobs", jobs]
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, [*fixed, *options])])
        if jobs > 1:
            monkeypatch.setattr(compare, "perform", perform)  # other processes have the original
        compare.main()
        return sorted(trained)

    run.out, run.printed = tmp_path / "out", lambda: capsys.readouterr().out
    return run


def runs_of(out):
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("runs/*.json"))]


def test_from_text_to_tables_and_figures(program, monkeypatch):
    monkeypatch.setattr(compare, "plot", PLOT)
    program("--seeds", 2)
    printed, saved = program.printed(), (program.out / "compare.md").read_text(encoding="utf-8")
    assert saved in printed
    assert [line for line in saved.splitlines() if line.startswith("#")] == [
        "# Does geometry replace attention?", "## 1. One", "## 1. Large", "## 5. Two", "## 6. Where attention wins",
    ]  # fmt: skip
    for figure in ("compare_1.png", "compare_5.png", "compare_6.png"):
        assert (program.out / figure).read_bytes().startswith(b"\x89PNG")
    runs = runs_of(program.out)
    whole = [run for run in runs if run["label"] in ("Grassmann, seed 0", "Grassmann, seed 1")]
    assert {run["spec"]["seed"] for run in whole} == {0, 1}
    losses = [run["curve"][-1][1] for run in whole]
    row = next(line for line in saved.splitlines() if line.startswith("| Grassmann |"))
    assert f"| {sum(losses) / 2:.3f} ({min(losses):.3f} to {max(losses):.3f}) |" in row
    assert f"| {whole[0]['parameters']:,} |" in row
    large = saved[saved.index("## 1. Large") : saved.index("## 5.")]
    assert " to " not in large.splitlines()[-2]  # one seed
    timing = json.loads((program.out / "timing.json").read_text(encoding="utf-8"))
    assert timing["machine"] in saved and len(timing["ms"]) == 3
    assert all(f"| {ms:.1f} |" in saved for question in timing["ms"].values() for ms in question)
    assert "`python compare.py --data" in saved and np.__version__ in saved
    assert saved.count("| recall |") == saved.count("| brackets |") == 2
    assert not list(program.out.glob("**/*.tmp"))


def test_resume_trains_what_is_missing_and_nothing_else(program):
    everything = program("--only", 1, 5)
    count = {label: everything.count(f"{label}, seed 1") for label in ("attention", "Grassmann", "sum")}
    assert count == {"attention": 1, "Grassmann": 1, "sum": 0}  # three seeds in question 1, one in question 5
    table = (program.out / "compare.md").read_text(encoding="utf-8")
    assert len(everything) == len(runs_of(program.out))
    assert everything.count("attention, seed 0") == 2  # one for both questions, and the large one
    assert program("--only", 1, 5) == []
    assert (program.out / "compare.md").read_text(encoding="utf-8") == table
    documents = {path: path.read_text(encoding="utf-8") for path in program.out.glob("runs/*.json")}
    missing, before = next(item for item in documents.items() if '"label": "sum, seed 0"' in item[1])
    missing.unlink()
    assert program("--only", 1, 5) == ["sum, seed 0"]
    assert missing.read_text(encoding="utf-8") == before


def test_ctrl_c_in_one_process_loses_only_the_current_run(program, monkeypatch):
    everything = len(program("--only", 1, 5))
    for path in program.out.glob("runs/*"):
        path.unlink()
    real, calls = grassmann.loss_and_grads, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(grassmann, "loss_and_grads", interrupted)
        with pytest.raises(SystemExit) as stop:
            program("--only", 1, 5)
    assert stop.value.code == 130
    done = len(runs_of(program.out))
    assert 0 < done < everything and not list(program.out.glob("**/*.tmp"))
    assert len(program("--only", 1, 5)) == everything - done


def test_several_processes_and_one_get_the_same(program):
    program("--seeds", 2)
    files = {path.name: path.read_bytes() for path in program.out.glob("runs/*")}
    for path in program.out.glob("runs/*"):
        path.unlink()
    program("--seeds", 2, jobs=2)
    assert {path.name: path.read_bytes() for path in program.out.glob("runs/*")} == files


def test_an_error_in_another_process_gets_one_line(program, monkeypatch, capsys):
    """A run that can't be trained, or not written; nothing of the other processes is left."""
    program("--only", 1)
    everything = sorted(program.out.glob("runs/*"))
    for path in everything:
        path.unlink()
        path.with_suffix(".tmp").mkdir()  # where the file would be written
    with pytest.raises(SystemExit) as stop:
        program("--only", 1, jobs=2)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "directory" in error.lower()
    assert not compare.multiprocessing.active_children()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("victim", ["all", "parent", "worker"])
def test_stopped_from_outside(tmp_path, victim):
    """Ctrl-C in a terminal reaches all processes, a signal from elsewhere only one; and then it goes on."""
    out = tmp_path / "out"
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    code = """
import sys; sys.path.insert(0, sys.argv.pop(1))
import compare
if __name__ == "__main__":
    compare.BASE |= {"context": 8, "n_layer": 1, "d_model": 8, "rank": 4, "iters": 10**9}
    compare.QUESTIONS = [compare.Question(1, "", "", [compare.ATTENTION, compare.GRASSMANN])]
    compare.best_lr = lambda ask, rates: 1e-3
    compare.steps = lambda study, settings: settings["iters"]
    compare.main()
"""
    (tmp_path / "small.py").write_text(code, encoding="utf-8")
    root, options = Path(compare.__file__).parent, ["--data", tmp_path / "text.txt", "--out", out, "--only", "1"]
    command = list(map(str, [sys.executable, tmp_path / "small.py", root, *options, "--jobs", "2"]))
    how = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, **how) as program:
        try:
            assert program.stdout.readline() == "2 runs to train, 2 at a time\n"
            children, workers = Path(f"/proc/{program.pid}/task/{program.pid}/children"), []
            if victim == "worker":
                if not children.exists():
                    pytest.skip("needs Linux's /proc")
                while len(workers) < 2:
                    pids = children.read_text().split()
                    workers = [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
                os.kill(int(workers[0]), signal.SIGKILL)
            else:
                time.sleep(0.5)
                (os.killpg if victim == "all" else os.kill)(program.pid, signal.SIGINT)
            _, error = program.communicate(timeout=20)  # ends when the last process that could write has ended
        finally:
            program.kill()  # its processes end with it
    assert (program.returncode, error.count("\n")) == ((2, 1) if victim == "worker" else (130, 2)), error
    assert ("was killed" if victim == "worker" else "stopped") in error


def test_a_full_disk_leaves_no_half_a_run(program, monkeypatch, capsys):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(compare.os, "fsync", full)
        with pytest.raises(SystemExit) as stop:
            program("--only", 1, "--seeds", 1)
    assert stop.value.code == 2 and "No space left on device" in capsys.readouterr().err
    assert not list(program.out.glob("runs/*.json"))
    assert len(program("--only", 1, "--seeds", 1)) == len(runs_of(program.out))


def test_a_damaged_file_is_named(program, capsys):
    program("--only", 1, "--seeds", 1)
    damaged = sorted(program.out.glob("runs/*"))[0]
    damaged.write_text('{"label": ', encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        program("--only", 1, "--seeds", 1)
    assert stop.value.code == 2 and str(damaged) in capsys.readouterr().err


@pytest.mark.parametrize("options, reason", [
    (["--only", 10], "--only"), (["--only", 1, "--data", "absent.txt"], "absent.txt"), (["--seeds", 0], "--seeds"),
])  # fmt: skip
def test_options_that_make_no_sense_get_one_line(program, capsys, options, reason):
    with pytest.raises(SystemExit) as stop:
        program(*options)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and reason in error


def test_a_text_shorter_than_a_window_is_refused(program, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("green", encoding="utf-8")
    with pytest.raises(SystemExit):
        program()
    assert "the text has 5 characters" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [{"iters": 30}, {"batch_size": 5}, {"weight_decay": 0.2}, {"grad_clip": 2.0}, {"dropout": 0.2}, {"context": 9},
     {"normalize": True}, {"offsets": ((1,), (2,))}, {"rank": 6}, {"d_model": 12}, {"block": "paper"}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_changed_settings_reuse_nothing(program, monkeypatch, change):
    everything = program("--only", 5, "--seeds", 1)
    monkeypatch.setattr(compare, "BASE", compare.BASE | change)
    assert program("--only", 5, "--seeds", 1) == everything


def test_another_text_reuses_nothing(program, tmp_path):
    everything = program("--only", 5, "--seeds", 1)
    (tmp_path / "text.txt").write_text(TEXT.replace("green", "brown"), encoding="utf-8")
    assert program("--only", 5, "--seeds", 1) == everything


def test_the_time_of_a_step_is_measured_once(program, monkeypatch):
    """Steps of the models by turns, the first of them not counted; kept until the file or the machine changes."""
    program("--only", 5, "--seeds", 1)
    path, clock, turns = program.out / "timing.json", [0.0], []
    path.unlink()

    def step(spec, params, optimizer, step, x, y, threads, real=compare.train_step):
        turns.append(spec["mixer"])
        assert threads == compare.cpu.available_cores()
        warm = step < compare.WARM
        clock[0] += 9.0 if warm else {"attention": 0.002, "grassmann": 0.001}[spec["mixer"]]
        return real(spec, params, optimizer, step, x, y, threads)

    monkeypatch.setattr(compare, "train_step", step)
    monkeypatch.setattr(compare.time, "perf_counter", lambda: clock[0])
    assert program("--only", 5, "--seeds", 1) == []
    assert turns == ["attention", "grassmann"] * (compare.WARM + compare.TIMED)
    measured = json.loads(path.read_text(encoding="utf-8"))
    assert [pytest.approx(ms) for ms in next(iter(measured["ms"].values()))] == [2.0, 1.0]
    program("--only", 5, "--seeds", 1)
    assert len(turns) == 2 * (compare.WARM + compare.TIMED)
    monkeypatch.setattr(compare, "machine", lambda: "another processor")
    program("--only", 5, "--seeds", 1)
    assert len(turns) == 4 * (compare.WARM + compare.TIMED)
    assert "another processor" in (program.out / "compare.md").read_text(encoding="utf-8")


def test_the_quick_set(program):
    program("--quick")
    saved = (program.out / "compare.md").read_text(encoding="utf-8")
    assert "## 1. One" in saved and "## 5. Two" in saved and "Large" not in saved and "## 6" not in saved
    assert {run["spec"]["seed"] for run in runs_of(program.out)} == {0}
    searches = [run["spec"] for run in runs_of(program.out) if ", lr " in run["label"]]
    assert {spec["product"] for spec in searches} == {"wedge"}  # a variant takes the plain model's learning rate


def test_quick_runs_are_no_longer_than_the_help_says(program, monkeypatch):
    monkeypatch.setattr(compare, "QUICK_STEPS", 1)
    program("--quick", "--only", 1, 6)
    assert {run["spec"]["iters"] for run in runs_of(program.out)} == {1}


def test_quick_has_no_large_question(program, monkeypatch, capsys):
    """And what was written before stays."""
    monkeypatch.setattr(compare, "QUESTIONS", [ONE, replace(LARGE, number=9)])
    program("--quick", "--only", 1)
    before = (program.out / "compare.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit):
        program("--quick", "--only", 9)
    assert "question 9" in capsys.readouterr().err
    assert (program.out / "compare.md").read_text(encoding="utf-8") == before


def test_every_number_that_can_be_asked_for_has_questions():
    assert {question.number for question in QUESTIONS} | {6} == set(range(1, 10))
    for question in QUESTIONS:
        assert question.rows[0] == (compare.ATTENTION if question.same_size else ("default", {}))
        assert len(dict(question.rows)) == len(question.rows)
        s = compare.BASE | question.size
        assert question.large or s["batch_size"] * s["context"] * s["iters"] == 12 * 64 * 2000  # as the report says


def test_it_trains_as_train_char_does(program, tmp_path, monkeypatch):
    """The same losses to the last bit: same start, batches, schedule, clipping, optimiser and validation."""
    monkeypatch.setattr(compare, "BASE", compare.BASE | {"iters": 40, "warmup_iters": 4})
    program("--only", 1, "--seeds", 1)
    run = next(run for run in runs_of(program.out) if run["label"] == "Grassmann, seed 0")
    options = {"dropout": 0, "iters": 40, "warmup-iters": 4, "eval-every": 40, "lr": run["spec"]["lr"], "threads": 1,
               "out": tmp_path / "train_char", "data": tmp_path / "text.txt"}  # fmt: skip
    options |= {name.replace("_", "-"): TINY[name] for name in ("context", "n_layer", "d_model", "rank", "batch_size")}
    args = train_char.build_parser().parse_args([f"--{name}={value}" for name, value in options.items()])
    args.out.mkdir()
    assert train_char.train(train_char.runs.make_run(args, None), []) == run["curve"][-1][1]


def test_both_mixers_see_the_same_batches(program, monkeypatch):
    seen, real = {"attention": [], "grassmann": []}, grassmann.loss_and_grads

    def watched(params, config, x, y, seed, threads):
        seen[config.mixer].append((seed, x.tolist(), y.tolist()))
        return real(params, config, x, y, seed, threads)

    monkeypatch.setattr(grassmann, "loss_and_grads", watched)
    monkeypatch.setattr(compare, "best_lr", lambda *how: 1e-3)
    monkeypatch.setattr(compare, "timed", lambda study, answers: [a._replace(ms=1.0) for a in answers])
    monkeypatch.setattr(compare, "QUESTIONS", [ONE])
    program("--only", 1, "--seeds", 2)
    assert len(seen["grassmann"]) == 6
    assert sorted(seen["attention"]) == sorted(seen["grassmann"])
    assert sorted(seed for seed, _, _ in seen["grassmann"]) == [(s, step) for s in (0, 1) for step in range(3)]
    batches = [x for _, x, _ in seen["grassmann"]]
    assert all(x not in batches[:k] for k, x in enumerate(batches))  # other seeds and steps, other batches


def test_a_model_trains_and_is_validated_with_its_product(program, monkeypatch):
    seen = set()
    for name, real in (("training", grassmann.loss_and_grads), ("validation", grassmann.validation_loss)):

        def watched(params, config, *how, name=name, real=real):
            if config.mixer == "grassmann":
                seen.add((name, grassmann.plucker_forward, grassmann.plucker_backward))
            return real(params, config, *how)

        monkeypatch.setattr(grassmann, real.__name__, watched)
    program("--only", 5, "--seeds", 1)
    pair = variants.symmetric_forward, variants.symmetric_backward
    assert seen == {("training", *pair), ("validation", *pair)}


@pytest.mark.parametrize("optimum, best", [(2.2e-3, 2e-3), (3e-2, 3.2e-2), (3e-4, 2.5e-4)])
def test_best_learning_rate(optimum, best):
    """The best of the grid; beyond its edges, the grid grows."""
    tried = []

    def run(lr):
        tried.append(lr)
        loss = math.nan if lr > 0.05 else math.log(lr / optimum) ** 2
        return {"curve": [[50, loss]], "spec": {"iters": 50}}

    for rates in (compare.LEARNING_RATES, compare.LEARNING_RATES[:2]):
        assert compare.best_lr(run, rates) == pytest.approx(best)
        assert len(tried) == len(set(tried)) <= 7
        tried.clear()
    assert compare.best_lr(lambda lr: run(lr) if lr != 4e-3 else None, compare.LEARNING_RATES) is None


# ---- the table ----------------------------------------------------------------------------------------


def run_with(curve, iters=100):
    return {"curve": curve, "spec": {"iters": iters}, "parameters": 1234}


def cells(answers):
    heading, _, *rows = [line.strip("| ").split(" | ") for line in compare.table(answers).splitlines()]
    return [dict(zip(heading, row, strict=False)) for row in rows]


def test_what_the_table_says():
    attention = Answer("attention", 1e-3, [run_with([[50, 2.0], [100, 1.5]])], 100.0)
    curves = [[50, 1.8], [100, 1.4]], [[50, 1.6], [100, 1.2]]
    slow = Answer("slow", 4e-3, [run_with(curve) for curve in curves], 160.0)
    first, second = cells([attention, slow])
    assert first["loss at equal time"] == "1.500" and first["ms per step"] == "100.0"
    assert second["validation loss, nats"] == "1.300 (1.200 to 1.400)"
    assert second["bits per character"] == "1.876" and second["perplexity per character"] == "3.669"
    assert second["ms per step"] == "160.0" and second["parameters"] == "1,234" and second["learning rate"] == "0.004"
    assert second["loss at equal time"] == "1.600"  # a quarter of the way from 1.7 to 1.3
    assert second["gap to attention"] == "-18.1%"  # exp(1.3 - 1.5) - 1


def test_a_run_that_diverged_is_neither_good_nor_fast():
    attention = Answer("attention", 1e-3, [run_with([[50, 2.0], [100, 1.5]])], 100.0)
    diverged = Answer("diverged", 1e-1, [run_with([[3, 0.9]])], 30.0)
    first, second = cells([attention, diverged])
    assert first["loss at equal time"] == "1.500" and second["validation loss, nats"] == "inf"
    assert cells([diverged, attention])[1]["gap to diverged"] == "+nan%"


def test_a_loss_that_is_not_finite_ends_the_run(program, monkeypatch):
    real, steps = grassmann.loss_and_grads, []

    def diverging(*args):
        steps.append(1)
        loss, grads = real(*args)
        return loss * math.inf, grads

    monkeypatch.setattr(grassmann, "loss_and_grads", diverging)
    monkeypatch.setattr(compare, "timed", lambda study, answers: [a._replace(ms=1.0) for a in answers])
    trained = program("--only", 1, "--seeds", 1)
    assert len(steps) == len(trained)  # one each
    whole = [run for run in runs_of(program.out) if run["spec"]["iters"] > 1]
    assert len(whole) == 3 and all(compare.final(run) == math.inf for run in whole)


# ---- question 6 ---------------------------------------------------------------------------------------


def test_recall_asks_for_the_only_key(rng):
    x, y, distance = compare.recall(rng, 50, 64)
    asks = distance > 0
    np.testing.assert_array_equal(asks, x == ASK)  # the asking token itself says nothing
    np.testing.assert_array_equal(y[~asks], x[~asks])
    assert ((x < compare.ANSWERS).sum(1) == 1).all()
    row, t = np.nonzero(asks)
    np.testing.assert_array_equal(x[row, t - distance[row, t]], y[row, t])


def test_brackets_asks_for_the_one_that_it_closes(rng):
    """Between an opening bracket and the one that closes it, every bracket is closed within."""
    x, y, distance = compare.brackets(rng, 20, 64)
    asks = distance > 0
    np.testing.assert_array_equal(asks, x == ASK)
    np.testing.assert_array_equal(y[~asks], x[~asks])
    for row, t in zip(*np.nonzero(asks), strict=True):
        inside = x[row, t - distance[row, t] + 1 : t]
        depth = np.cumsum(np.where(inside == ASK, -1, 1))
        assert (depth >= 0).all() and (not len(inside) or depth[-1] == 0)
        assert x[row, t - distance[row, t]] == y[row, t]


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_cannot_be_guessed_from_near_by(task):
    """All answers are equally likely, and the token before the question does not tell which it is."""
    x, y, distance = TASKS[task](np.random.default_rng(0), 400, 64)
    answers = y[distance > 20]
    shares = np.bincount(answers, minlength=compare.ANSWERS) / len(answers)
    assert np.abs(shares - 1 / compare.ANSWERS).max() < 0.06
    near = np.roll(x, 1, 1)[distance > 20]
    assert abs((near == answers).mean() - (near < compare.ANSWERS).mean() / compare.ANSWERS) < 0.05


@pytest.mark.parametrize("task", TASKS)
def test_every_distance_from_1_to_200_is_asked(task):
    _, _, distance = TASKS[task](np.random.default_rng(0), 512, compare.RECALL_SIZE["context"])
    for low, high in zip(compare.EDGES[:-1], compare.EDGES[1:], strict=True):
        assert ((low <= distance) & (distance < high)).sum() >= 80
    assert (compare.EDGES[0], compare.EDGES[-1] - 1) == (1, 200)


@pytest.mark.parametrize("label, overrides", compare.RECALL_ROWS[:2])
@pytest.mark.parametrize("task", TASKS)
def test_an_untrained_model_guesses(task, label, overrides):
    settings = compare.BASE | TINY | {"context": 32}
    config = compare.config_of(compare.make_spec(settings, overrides, compare.TOKENS, task))
    sample = TASKS[task](np.random.default_rng(0), 600, 32)
    values = np.array(accuracy(grassmann.init_params(config), config, *sample)[:4])
    assert abs(values.mean() - 1 / compare.ANSWERS) < 0.05


def test_accuracy_is_sorted_by_distance(monkeypatch, rng):
    """A model that is right up to 16 tokens back, and never beyond."""
    x, y, distance = compare.recall(rng, 40, 64)
    says = np.where(distance <= 16, y, (y + 1) % compare.ANSWERS)
    rows = iter(np.array_split(says, 5))
    monkeypatch.setattr(grassmann, "forward", lambda params, config, chunk: np.eye(compare.TOKENS)[next(rows)])
    assert accuracy({}, None, x, y, distance)[:6] == [1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("overrides", [{}, {"offsets": compare.FAR}])
def test_how_far_a_grassmann_model_sees(overrides):
    """The line in compare_6.png: a token that far back changes the output, one more does not."""
    settings = compare.BASE | compare.RECALL_SIZE | {"d_model": 8, "rank": 3} | overrides
    config = compare.model(settings, compare.TOKENS)
    params = ordinary_params(config)
    reach = compare.reach(config.offsets)
    x = np.random.default_rng(0).integers(0, compare.TOKENS - 1, (1, config.context))
    before = grassmann.forward(params, config, x)[0, -1]
    for distance, seen in ((reach, True), (reach + 1, False)):
        changed = x.copy()
        changed[0, -1 - distance] += 1
        assert (grassmann.forward(params, config, changed)[0, -1] != before).any() == seen
