"""train_char.py: what a run leaves and prints, how options reach it, what is refused and how."""

import argparse
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from kill_and_resume import MODEL, ROOT, TEXT

import cli
import text as texts
import train_char
import training
from checkpoint import load_checkpoint
from grassmann import Config, default_offsets, generate, validation_loss
from text import decode, encode, read_corpus, vocabulary

as_root = hasattr(os, "geteuid") and os.geteuid() == 0
FILES = ["best.npz", "last.npz", "log.csv", "loss.png"]


def validated(checkpoint):
    """The validation loss of a checkpoint, on the last tenth of TEXT."""
    params, config, extra = load_checkpoint(checkpoint)
    with np.errstate(all="ignore"):
        return validation_loss(params, config, encode(TEXT, extra["vocab"])[-(len(TEXT) // 10) :])


def log_of(folder):
    header, *rows = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()]
    assert header == ["step", "train_loss", "val_loss", "lr", "seconds"]
    return rows


# ---- what a run leaves ---------------------------------------------------------------------------


def test_the_log_has_a_line_every_ten_steps_and_at_each_validation(trained):
    assert sorted(file.name for file in trained[0].iterdir()) == FILES
    rows = log_of(trained[0])
    assert [(row[0], bool(row[2])) for row in rows] == [
        ("10", False), ("15", True), ("20", False), ("30", True)]
    for step, train_loss, val_loss, lr, seconds in rows:
        assert float(lr) == training.Training(iters=30).rate(int(step) - 1)
        assert 0 < float(train_loss) < 4 and (not val_loss or 0 < float(val_loss) < 4)
        assert 0 < float(seconds) < 100


def test_the_plot_is_a_picture_with_nothing_behind_it(trained):
    picture = matplotlib.image.imread(trained[0] / "loss.png")
    height, width, _ = picture.shape
    assert height > 300 and width > 500 and picture[0, 0, 3] == 0
    assert len(np.unique(picture.reshape(-1, 4), axis=0)) > 10  # not an empty page


def test_what_is_printed(trained, text):
    out, printed = trained
    first, *_ = printed.splitlines()
    assert first == (f"{text}: 3,811 characters to train on, 423 to validate, 17 different ones; "
                     f"0.00M parameters; 1 thread; writing into {out}")
    assert re.search(r"\nabout \d+ seconds? to go\n", printed)
    summary, written = printed.split("A sample:\n\n")
    for name in ("best.npz", "last.npz"):
        loss, step = validated(out / name), load_checkpoint(out / name)[2]["step"]
        line = f"{loss:.4f} nats, {loss / np.log(2):.4f} bits per character, at step {step}"
        assert f"{name[:4]} validation loss {line}" in summary
    assert all(str(out / name) in summary for name in FILES)
    assert len(written) == 600 + 1 and set(written) <= set(TEXT)


def test_the_model_writes_a_line_at_each_validation(trained):
    """Of 70 characters, from the same start and seed."""
    params, config, extra = load_checkpoint(trained[0] / "last.npz")
    start = [extra["vocab"].index(10)]
    line = decode(generate(params, config, start, 70, 0.8, seed=0), extra["vocab"])
    lines = re.findall(r"(?m)^step +(\d+) .* nats/char .* s\n  (.{70})$", trained[1])
    assert [step for step, _ in lines] == ["15", "30"]
    assert lines[1][1] == line.replace("\n", "⏎") != lines[0][1]


def test_checkpoints_hold_the_best_and_the_last_state(call, succeeded, tmp_path):
    """Of a run whose steps are so long that it gets better and worse."""
    restless = ["--lr", 0.3, "--min-lr", 0.3, "--warmup-iters", 0, "--iters", 15, "--eval-every", 1]
    succeeded(call("train_char.py", *restless, "--out", tmp_path))
    losses = {int(row[0]): float(row[2]) for row in log_of(tmp_path)}
    assert list(losses) == list(range(1, 16))
    assert sorted(losses.values(), reverse=True) != list(losses.values())
    best, last = (load_checkpoint(tmp_path / name)[2] for name in ("best.npz", "last.npz"))
    for name, extra in (("best.npz", best), ("last.npz", last)):
        assert validated(tmp_path / name) == losses[extra["step"]]
    assert best["best"] == last["best"] == [best["step"], min(losses.values())]
    assert best["vocab"] == last["vocab"] == vocabulary(TEXT) and last["step"] == 15
    assert {"adam_m", "adam_v"} <= last.keys() and not {"adam_m", "adam_v"} & best.keys()
    log = [[str(row[0]), *("" if cell is None else str(cell) for cell in row[1:])]
           for row in last["log"]]
    assert log == log_of(tmp_path) and last["recent"] == []


def test_two_runs_are_equal_and_another_seed_is_not(call, succeeded, contents, trained, tmp_path):
    for seed, same in ((0, True), (2**63 - 1, False)):
        options = ["--iters", 30, "--eval-every", 15, "--seed", seed, "--out", tmp_path]
        succeeded(call("train_char.py", *options))
        assert (contents(tmp_path / "last.npz") == contents(trained[0] / "last.npz")) == same


def test_a_second_run_moves_the_first_one_aside(call, succeeded, refused, trained, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained[0], out)
    (out / "flow").mkdir()  # pictures of it
    (out / "flow" / "map.png").write_bytes(b"")
    before = {name: (out / name).read_bytes() for name in FILES}
    refused(call("train_char.py", "--context", 10**5, "--out", out))  # leaves all in its place
    assert {name: (out / name).read_bytes() for name in FILES} == before
    for number in (1, 2):
        before = {name: (out / name).read_bytes() for name in FILES if (out / name).exists()}
        printed = succeeded(call("train_char.py", "--iters", 2, "--out", out))
        assert str(out / f"previous-{number}") in printed
        moved = [file for file in (out / f"previous-{number}").iterdir() if file.is_file()]
        assert {file.name: file.read_bytes() for file in moved} == before
        assert not (out / "flow").exists()
    assert (out / "previous-1" / "flow" / "map.png").exists()


def test_the_bar_fits_a_terminal_and_begins_with_the_losses(on_terminal, text, tmp_path):
    options = [*MODEL, "--iters", 300, "--eval-every", 100, "--data", text, "--out", tmp_path]
    code, shown = on_terminal("train_char.py", *options)
    bars = [line for line in re.split(r"[\r\n]", shown) if "step/s" in line]
    assert code == 0 and bars and all(len(line) <= 80 for line in bars)
    assert re.match(r"loss \d\.\d{4} val \d\.\d{4}: .*300", bars[-1])
    # elsewhere: `succeeded` finds an empty stderr in every other test


# ---- validation ----------------------------------------------------------------------------------


def test_of_a_large_text_evenly_spread_pieces_are_validated(call, succeeded, tmp_path, monkeypatch):
    monkeypatch.setattr(train_char, "MOST_VALIDATED", 20_000)
    data, out = tmp_path / "large", tmp_path / "out"
    data.write_text("".join(f"{k} times {k} is {k * k}\n" for k in range(18_000)))
    options = ["--iters", 2, "--eval-every", 1, "--data", data, "--out", out]
    printed = succeeded(call("train_char.py", *options))
    corpus = read_corpus(str(data), 8)
    assert f"{len(corpus.val):,} to validate (on 20,000 of them)" in printed
    params, config, _ = load_checkpoint(out / "last.npz")
    pieces = corpus.val[:10_001], corpus.val[-10_001:]
    expected = sum(validation_loss(params, config, piece) for piece in pieces) / 2
    assert float(log_of(out)[-1][2]) == pytest.approx(expected, rel=1e-12)
    assert len(corpus.val) > 40_000


def test_overfitting_is_named_once(call, succeeded, tmp_path, monkeypatch):
    losses = iter([3, 2, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6])
    monkeypatch.setattr(train_char, "validate", lambda run, signals: next(losses))
    options = ["--iters", 160, "--eval-every", 20, "--lr", 0.01, "--out", tmp_path]
    before, named, after = succeeded(call("train_char.py", *options)).partition("by heart")
    assert named and "by heart" not in after
    assert "step    100 " in before and "step    120 " not in before  # the third rise


@pytest.mark.parametrize("falling, rising", [
    ([3, 2, 1, 0], [2, 3, 4]), ([0, 1, 2, 3], [1, 2, 3, 4]), ([3, 2, 1, 0], [1, 2, 1.9, 4])])
def test_what_overfitting_is_not(falling, rising):
    log = [[k, a, b, 0, 0] for k, (a, b) in enumerate(zip(falling, rising, strict=False))]
    assert not train_char.overfits(log)


@pytest.mark.parametrize("trouble, fails", [
    ({"MPLBACKEND": "nonsense"}, True), ({"MPLCONFIGDIR": "latex"}, True),
    ({"MPLCONFIGDIR": "/dev/null/nowhere"}, False)])
def test_a_plot_that_fails_is_a_line(train, tmp_path, trouble, fails):
    """A backend that does not exist, LaTeX that is not installed, a cache that nobody can write."""
    (tmp_path / "latex").mkdir()
    (tmp_path / "latex" / "matplotlibrc").write_text("text.usetex: True\n")
    env = os.environ | trouble | {"PATH": ""}
    process = train("--iters", 1, out="out", cwd=tmp_path, env=env)
    assert process.returncode == 0 and "A sample:" in process.stdout
    assert ("\nno loss.png: " in process.stdout) == fails
    assert (tmp_path / "out" / "loss.png").exists() != fails
    assert "Traceback" not in process.stderr and not (fails and process.stderr)


# ---- options reach the model ---------------------------------------------------------------------


@pytest.mark.parametrize("flags, expected", [
    ("--context 9 --n-layer 3 --d-model 12 --rank 4 --offsets 1,2;5;8 --normalize --positions "
     "--dropout 0.25", {"context": 9, "n_layer": 3, "d_model": 12, "rank": 4, "normalize": True,
                        "offsets": ((1, 2), (5,), (8,)), "positions": True, "dropout": 0.25}),
    ("--no-taps --block paper", {"taps": False, "block": "paper"}),
    ("--mixer attention --n-head 2 --d-ff 7", {"mixer": "attention", "n_head": 2, "d_ff": 7}),
    ("--paper --rank 4 --no-positions", {"block": "paper", "taps": False, "normalize": True,
        "positions": False, "d_ff": 32, "rank": 4, "offsets": ((1,), (2,))}),
    ("--paper --n-layer 6", {"block": "paper", "taps": False, "normalize": True, "positions": True,
        "n_layer": 6, "d_ff": 32, "offsets": ((1,), (2,), (4,), (1,), (1,), (1,))}),
])
def test_every_model_option_reaches_the_configuration(call, succeeded, tmp_path, flags, expected):
    succeeded(call("train_char.py", "--iters", 1, *flags.split(), "--out", tmp_path))
    _, config, extra = load_checkpoint(tmp_path / "best.npz")
    tiny = {"context": 8, "n_layer": 2, "d_model": 8, "rank": 3}
    assert config == Config(vocab_size=len(set(TEXT)), **tiny | expected)
    for name, value in expected.items():
        assert json.dumps(extra["settings"][name]) == json.dumps(value)


def test_every_other_option_reaches_the_settings(call, succeeded, text, tmp_path):
    given = {"batch_size": 3, "iters": 2, "lr": 0.01, "min_lr": 0.005, "warmup_iters": 1,
             "weight_decay": 0.2, "grad_clip": 0.5, "eval_every": 1, "seed": 7}
    flags = (("--" + name.replace("_", "-"), value) for name, value in given.items())
    succeeded(call("train_char.py", *itertools.chain(*flags), "--out", tmp_path))
    settings = load_checkpoint(tmp_path / "last.npz")[2]["settings"]
    assert {name: settings[name] for name in given} == given and settings["data"] == [str(text)]
    assert [float(row[3]) for row in log_of(tmp_path)] == [0.005, 0.01]


@pytest.mark.parametrize("preset", train_char.PRESETS)
def test_presets(monkeypatch, tmp_path, preset):
    """Each is what its name stands for, and an option beside it wins."""
    monkeypatch.setattr(sys, "argv", ["train_char.py"])
    _, own = train_char.PRESETS[preset]
    args = train_char.build_parser().parse_args(["--preset", preset, "--rank", "4"])
    run = train_char.make_run(args)
    expected = train_char.DEFAULTS | own | {"rank": 4}
    shown = {name: run.settings[name] for name in expected.keys() - {"offsets", "d_ff"}}
    assert shown == {name: expected[name] for name in shown}
    assert run.config.offsets == (own.get("offsets") or default_offsets(4, 64, True))
    assert preset in " ".join(train_char.build_parser().format_help().split())


@pytest.mark.parametrize("context", [2, 99])
def test_a_text_of_the_least_length_trains(call, succeeded, refused, tmp_path, context):
    """The length that the refusal of a shorter text asks for is enough."""
    short, long = tmp_path / "short", tmp_path / "long"
    attention = ["--iters", 1, "--mixer", "attention", "--n-head", 2, "--context", context]
    short.write_text("ab")
    message = refused(call("train_char.py", *attention, "--data", short, "--out", tmp_path / "out"))
    least = int(re.findall(r"\d+", message)[-1])
    long.write_text("ab" * (least // 2) + "a" * (least % 2))
    succeeded(call("train_char.py", *attention, "--data", long, "--out", tmp_path / "out"))


@pytest.mark.parametrize("name", ["train_char.py", "sample.py"])
def test_help_lists_every_option_with_its_default(call, succeeded, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    printed = succeeded(call(name, "--help"))
    assert "(default: 5000)" in printed or "(default: out/best.npz)" in printed.replace("\\", "/")
    options = printed[printed.index("\noptions:") :]
    assert max(map(len, options.splitlines())) <= 80
    found = re.findall(r"(?m)^  (--[\w-]+)(.*(?:\n   .*)*)", options)
    told = {flag: " ".join(rest.split()) for flag, rest in found}
    silent = {flag for flag, text in told.items() if "(default: " not in text}
    assert silent <= {"--gpu", "--resume", "--version", "--paper", "--preset", "--escapes",
                      "--interactive"}
    if name == "train_char.py":
        for setting, default in train_char.DEFAULTS.items():
            text = told["--" + setting.replace("_", "-")]
            assert f"(default: {default})" in text or default is None
    assert re.match(r"grassmann \d.*Python.*NumPy", succeeded(call(name, "--version")))


# ---- commands and imports ------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="the commands to copy are those of a shell")
@pytest.mark.parametrize("folder", ["$\\frac$ 模型, a=b;c", "-dash"])
def test_commands_run_as_they_are_printed(train, succeeded, plain, tmp_path, folder):
    printed = succeeded(train("--iters", 2, out=f"./{folder}", cwd=tmp_path))
    sampling, resuming = re.findall(r"(?:sample|go on) from: (.*)", printed)
    assert "MORE" in resuming
    for command in (f"{sampling} --length 3", resuming.replace("MORE", "3")):
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=plain, capture_output=True)
        assert done.returncode == 0, done
    assert load_checkpoint(tmp_path / folder / "last.npz")[2]["step"] == 3


def test_python_is_named_only_where_it_is_this_one(monkeypatch, tmp_path):
    ours, other = tmp_path / "ours" / "python", tmp_path / "other" / "python"
    for folder in (ours, other):
        folder.parent.mkdir()
        folder.symlink_to(os.path.realpath(sys.executable))
    monkeypatch.setattr(sys, "executable", str(ours))
    monkeypatch.setattr(sys, "argv", ["../train_char.py"])
    for found, word in ((ours, "python"), (other, str(ours)), (None, str(ours))):
        monkeypatch.setattr(cli.shutil, "which", lambda name, found=found: found and str(found))
        assert shlex.split(cli.command("sample.py", Path("a b"))) == [word, "../sample.py", "a b"]


@pytest.mark.parametrize("name, package", [
    ("train_char.py", "numpy"), ("train_char.py", "tqdm"), ("sample.py", "numpy")])
def test_a_missing_package(program, without, name, package):
    process = program(name, env=without(package))
    install = f"-m pip install -r {ROOT / 'requirements.txt'}"
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr.startswith(f"{name}: {package} is not installed; ")
    assert process.stderr.endswith(f"{install}\n") and process.stderr.count("\n") == 1


def test_an_old_python(ended):
    old = f"import runpy, sys; sys.version_info = (3, 9); runpy.run_path({str(ROOT / 'cli.py')!r})"
    process = subprocess.run([sys.executable, "-c", old], capture_output=True, text=True)
    assert process.returncode == 1
    assert re.fullmatch(r"this needs Python 3\.10 or newer, not 3.*\n", process.stderr)


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
@pytest.mark.parametrize("module", ["argparse", "numpy", "tqdm"])
def test_ctrl_c_during_the_imports(program, tmp_path, module):
    pressed = "import os, signal; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(9)"
    (tmp_path / f"{module}.py").write_text(pressed)
    process = program("train_char.py", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (process.returncode, process.stdout, process.stderr) == (-signal.SIGINT, "", "")


def test_isolated_optimised_and_in_another_language(text, tmp_path, ended):
    """python -I leaves the program's folder out of its path, -OO the docstrings."""
    command = [sys.executable, "-I", "-OO", ROOT / "train_char.py", *MODEL, "--iters", "1"]
    command += ["--data", text, "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"LC_ALL": "C"})
    assert (done.returncode, done.stderr) == (0, b"") and b"A sample:" in done.stdout


# ---- bad input -----------------------------------------------------------------------------------


def unreadable(path):
    if as_root:
        pytest.skip("root may read a file without permissions")
    path.write_text(TEXT)
    path.chmod(0)


BAD_TEXTS = {
    "missing": (lambda path: None, "No such file"),
    "empty": (lambda path: path.write_text(""), "the text has 0 characters"),
    "byte order mark only": (lambda path: path.write_bytes(b"\xef\xbb\xbf"), "has 0 characters"),
    "binary": (lambda path: path.write_bytes(bytes(range(256)) * 10), "text (byte 128 is 0x80)"),
    "cut character": (lambda path: path.write_bytes(b"a" * 99 + b"\xc3"), "(byte 99 is 0xc3); save"),
    "UTF-16": (lambda path: path.write_text(TEXT, encoding="utf-16"), "iconv -f WINDOWS-1252 -t"),
    "folder": (lambda path: path.mkdir(), "no UTF-8 text in"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "circular link": (lambda path: path.symlink_to("bad"), "symbolic links"),
    "a line break in its name": (lambda path: None, "No such file"),
    "unreadable": (unreadable, "Permission denied"),
    "endless": (lambda path: path.symlink_to("/dev/zero"), "is larger than"),
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_bad_texts(call, refused, tmp_path, monkeypatch, kind):
    make, message = BAD_TEXTS[kind]
    monkeypatch.setattr(texts, "MOST_BYTES", 10_000)
    bad = tmp_path / ("two\nlines" if "break" in kind else "bad")
    make(bad)
    sentence = refused(call("train_char.py", "--data", bad, "--out", tmp_path / "out"))
    assert message in sentence
    assert " ".join(str(bad).split()) in sentence or "characters" in sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, message", [
    ("--offsets 0;1", "1 to context - 1"), ("--offsets 1;8", "1 to context - 1"),
    ("--offsets 1,1;2", "distinct"), ("--offsets 1", "one tuple per layer"),
    ("--offsets 1;x", "'1;x' is not of the form"), ("--rank 1", "1 is not between 2 and 10,000"),
    ("--mixer attention --n-head 3", "n_head must divide d_model"), ("--d-model 1000000", "memory"),
    ("--context 300000 --batch-size 1000000", "characters"), ("--context 1", "1 to context - 1"),
    ("--lr 0", "--lr: 0 is not above 0 and at most 10"), ("--lr nan", "--lr"),
    ("--lr 0.001 --min-lr 0.01", "--min-lr (0.01) must not exceed --lr (0.001)"),
    ("--dropout 1", "--dropout"), ("--iters 1.5", "'1.5' is not a whole number"),
    ("--iters 1e9", "'1e9' is not a whole number"), ("--iters 5000000000", "1 and 1,000,000,000"),
    (f"--seed {2**63}", "is not between 0 and 9,223,372,036,854,775,807"), ("--iter 5", "--iter"),
    ("stray", "stray"), ("--precision tf32", "--gpu"), ("--preset huge", "'laptop', 'tiny', 'best'"),
])
def test_bad_options(call, refused, tmp_path, flags, message):
    process = call("train_char.py", "--iters", 5, *flags.split(" "), "--out", tmp_path / "out")
    assert message in refused(process)
    assert process.stdout == "" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [
    "--batch-size 1000000", "--mixer attention --batch-size 1 --n-head 1"])
def test_batches_larger_than_memory(call, refused, tmp_path, flags):
    data = tmp_path / "text"
    data.write_text("ab" * 200_000)
    options = ["--context", 300_000, *flags.split(), "--data", data, "--out", tmp_path / "out"]
    assert "memory" in refused(call("train_char.py", *options))
    assert not (tmp_path / "out").exists()


def test_several_hundred_thousand_windows_a_step(call, succeeded, tmp_path):
    options = "--context 2 --d-model 2 --rank 2 --n-layer 1 --batch-size 300000 --iters 1"
    succeeded(call("train_char.py", *options.split(), "--out", tmp_path))


def test_no_more_threads(call, refused, tmp_path, monkeypatch):
    """As after ulimit -u."""

    def refuse(*args):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(training.ThreadPoolExecutor, "submit", refuse)
    process = call("train_char.py", "--threads", 2, "--iters", 1, "--out", tmp_path)
    assert "--threads 1 needs none" in refused(process)


def test_output_folder_that_cannot_be_written(call, refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "under", tmp_path / ("x" * 300)):
        assert str(out) in refused(call("train_char.py", "--iters", 2, "--out", out))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(as_root, reason="root may write into a read-only folder")
def test_read_only_output_folder(call, refused, tmp_path):
    tmp_path.chmod(0o555)
    for out in (tmp_path, tmp_path / "new"):
        assert str(tmp_path) in refused(call("train_char.py", "--iters", 2, "--out", out))
    tmp_path.chmod(0o755)


def test_checkpoint_larger_than_files_may_be(train, refused, tmp_path):
    """The system refuses the write half way, as a full disk does; no half-written file stays."""
    resource = pytest.importorskip("resource")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # noqa: E731
    sentence = refused(train("--iters", 2, out=tmp_path / "out", preexec_fn=limit))
    assert str(tmp_path / "out") in sentence
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to RLIMIT_AS")
def test_too_little_memory(train, refused, tmp_path):
    """What the process may use, not what the machine has: found only when an allocation fails."""
    import resource

    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))  # noqa: E731
    large = ["--d-model", 6000, "--n-layer", 1]
    assert "memory" in refused(train(*large, out=tmp_path, preexec_fn=limit))


# ---- nobody listens ------------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_the_output(train, tmp_path):
    with open("/dev/full", "w") as full:
        process = train("--iters", 20, "--eval-every", 10, out=tmp_path, stdout=full)
    silent = "standard output: No space left on device; going on without it\n"
    assert (process.returncode, process.stderr) == (0, silent)
    assert load_checkpoint(tmp_path / "last.npz")[2]["step"] == 20


@pytest.mark.skipif(os.name != "posix", reason="closed by a POSIX shell")
@pytest.mark.parametrize("how", ["| head -1", "2>&1 | head -1", ">&-", "2>&-"])
def test_a_run_goes_on_when_nobody_reads(text, plain, tmp_path, how):
    options = [*MODEL, "--data", text, "--out", tmp_path, "--iters", "40", "--eval-every", "10"]
    command = shlex.join(map(str, [sys.executable, ROOT / "train_char.py", *options]))
    process = subprocess.run(
        f"set -o pipefail; {command} {how}", shell=True, executable=shutil.which("bash"),
        capture_output=True, env=plain)
    assert (process.returncode, process.stderr) == (0, b"")
    assert load_checkpoint(tmp_path / "last.npz")[2]["step"] == 40


# ---- numbers that go wrong -----------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    "--lr 10 --eval-every 10", "--lr 10 --eval-every 1", "--lr 10 --eval-every 1 --block paper",
    "--lr 1 --eval-every 1 --mixer attention", "--lr 10 --eval-every 1000 --dropout 0.1",
    "--lr 10 --eval-every 1 --block paper --mixer attention",
    "--lr 10 --eval-every 3 --no-taps --normalize"])
def test_a_loss_that_is_not_a_number_stops_the_run(call, refused, tmp_path, flags):
    """It stops with the step named, and what it leaves is the last state that was still good."""
    diverging = "--grad-clip 0 --warmup-iters 0 --weight-decay 10 --iters 200"
    options = [*diverging.split(), *flags.split(), "--out", tmp_path]
    sentence = refused(call("train_char.py", *options))
    step = re.search(r"at step (\d+): lower --lr", sentence)[1]
    assert str(tmp_path / "last.npz") in sentence
    assert load_checkpoint(tmp_path / "last.npz")[2]["step"] < int(step)
    assert np.isfinite(validated(tmp_path / "last.npz"))
    for file in tmp_path.glob("best.npz"):
        assert np.isfinite(load_checkpoint(file)[2]["best"][1])
    assert "nan" not in (tmp_path / "log.csv").read_text(encoding="utf-8")


# ---- functions -----------------------------------------------------------------------------------


def test_parse_offsets():
    for given, layers in (("1", ((1,),)), (" 1 , 2 ; 3 ", ((1, 2), (3,)))):
        assert train_char.parse_offsets(given) == layers
    for given in ("", ";", "1;;2", "1,,2", "a", "1.0", "1;2;", "0x1"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not of the form"):
            train_char.parse_offsets(given)


@pytest.mark.parametrize("above, accepted, rejected", [
    (False, ["0", "10", "2.5"], ["-1e-9", "10.1", "nan", "inf", "", "x"]),
    (True, ["1e-300", "10"], ["0", "-0.0"])])
def test_number(above, accepted, rejected):
    parse = cli.number(float, 0, 10, above=above)
    assert [parse(given) for given in accepted] == [float(given) for given in accepted]
    for given in rejected:
        with pytest.raises(argparse.ArgumentTypeError):
            parse(given)


def test_one_and_many():
    assert [cli.plural(n, "thread") for n in (1, 2, 1000)] == ["1 thread", "2 threads", "1,000 threads"]
