"""train_char.py: what a run leaves and prints, how options reach it, what is refused and how."""

import argparse
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
from kill_and_resume import MODEL, ROOT, TEXT

import cli
import parallel
import text as texts
import train_char
import training
from checkpoint import load_checkpoint
from grassmann import Config, default_offsets, generate, validation_loss
from text import decode, encode, read_corpus, vocabulary

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

def test_the_log_has_a_line_every_ten_steps_and_at_each_validation(trained):
    """And the plot is a picture, with nothing behind it."""
    assert sorted(file.name for file in trained[0].iterdir()) == FILES
    rows = log_of(trained[0])
    assert [(row[0], bool(row[2])) for row in rows] == [
        ("10", False), ("15", True), ("20", False), ("30", True)]
    for step, train_loss, val_loss, lr, seconds in rows:
        run = training.Training(iters=30, lr=0.1, warmup_iters=0)
        assert float(lr) == run.rate(int(step) - 1)
        assert 0 < float(train_loss) < 4 and (not val_loss or 0 < float(val_loss) < 4)
        assert 0 < float(seconds) < 100
    picture = matplotlib.image.imread(trained[0] / "loss.png")
    assert picture.shape[0] > 300 and picture.shape[1] > 500 and picture[0, 0, 3] == 0
    assert len(np.unique(picture.reshape(-1, 4), axis=0)) > 10  # not an empty page

def test_the_log_of_millions_of_steps_has_fewer_lines(call, tmp_path, monkeypatch):
    """A checkpoint holds it, and a checkpoint has a largest size."""
    caught, train_step = [], train_char.train_step
    monkeypatch.setattr(train_char, "catch_signals", lambda: caught)

    def step(*args):
        caught.extend([signal.SIGINT] if args[5] == 59 else [])
        return train_step(*args)

    monkeypatch.setattr(train_char, "train_step", step)
    call("train_char.py", "--iters", 3_000_000, "--eval-every", 10**6, "--out", tmp_path)
    assert [row[0] for row in log_of(tmp_path)] == ["30", "60"]

def test_what_is_printed(trained, text):
    """Under each validation 70 characters that the model writes, from the same start and seed."""
    out, printed = trained
    assert printed.startswith(
        f"{text}: 3,811 characters to train on, 423 to validate, 17 different ones\n"
        f"0.00M parameters; 1 thread; writing into {out}\nabout ")
    assert re.search(r"\nabout \d+ seconds? to go\n", printed)
    summary, written = printed.split("A sample:\n\n")
    for name in ("best.npz", "last.npz"):
        loss, (params, config, extra) = validated(out / name), load_checkpoint(out / name)
        line = f"{loss:.4f} nats, {loss / np.log(2):.4f} bits per character, at step "
        assert f"{name[:4]} validation loss {line}{extra['step']}" in summary
    assert all(str(out / name) in summary for name in FILES)
    assert len(written) == 600 + 1 and set(written) <= set(TEXT)
    lines = re.findall(r"(?m)^step +(\d+) .* nats/char .* s\n  (.{70})$", printed)
    line = generate(params, config, [extra["vocab"].index(10)], 70, 0.8, seed=0)
    assert [step for step, _ in lines] == ["15", "30"]
    assert lines[1][1] == decode(line, extra["vocab"]).replace("\n", "⏎") != lines[0][1]

def test_checkpoints_hold_the_best_and_the_last_state(call, succeeded, tmp_path):
    """Of a run whose steps are so long that it gets better and worse."""
    restless = ["--lr", 0.3, "--min-lr", 0.3, "--warmup-iters", 0, "--iters", 15, "--eval-every", 1]
    succeeded(call("train_char.py", *restless, "--out", tmp_path))
    losses = {int(row[0]): float(row[2]) for row in log_of(tmp_path)}
    assert list(losses) == list(range(1, 16))
    assert sorted(losses.values(), reverse=True) != list(losses.values())
    best, last = (load_checkpoint(tmp_path / name)[2] for name in ("best.npz", "last.npz"))
    assert validated(tmp_path / "best.npz") == losses[best["step"]] == min(losses.values())
    assert validated(tmp_path / "last.npz") == losses[15] and last["step"] == 15
    assert best["best"] == last["best"] == [best["step"], min(losses.values())]
    assert best["vocab"] == last["vocab"] == vocabulary(TEXT)
    assert {"adam_m", "adam_v"} <= last.keys() and not {"adam_m", "adam_v"} & best.keys()
    assert [[*map(str, row)] for row in last["log"]] == log_of(tmp_path) and last["recent"] == []

def test_two_runs_are_equal_and_another_seed_is_not(call, succeeded, contents, trained, tmp_path):
    for seed, same in ((0, True), (2**63 - 1, False)):
        options = ["--iters", 30, "--eval-every", 15, "--lr", 0.1, "--warmup-iters", 0]
        succeeded(call("train_char.py", *options, "--seed", seed, "--out", tmp_path))
        assert (contents(tmp_path / "last.npz") == contents(trained[0] / "last.npz")) == same

def test_a_second_run_moves_the_first_one_aside(call, succeeded, refused, trained, tmp_path):
    out = Path(shutil.copytree(trained[0], tmp_path / "out"))
    (out / "flow").mkdir()  # pictures of it
    before = {name: (out / name).read_bytes() for name in FILES}
    refused(call("train_char.py", "--context", 10**5, "--out", out))  # leaves all in its place
    for number in (1, 2):
        assert {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()} == before
        printed = succeeded(call("train_char.py", "--iters", 2, "--out", out))
        assert (moved := out / f"previous-{number}").name in printed
        assert {name: (moved / name).read_bytes() for name in before} == before
        before = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    assert (out / "previous-1" / "flow").exists() and not (out / "flow").exists()

def test_the_bar_fits_a_terminal_and_begins_with_the_losses(on_terminal, text, tmp_path):
    options = [*MODEL, "--iters", 300, "--eval-every", 100, "--data", text, "--out", tmp_path]
    code, shown = on_terminal("train_char.py", *options)
    bars = [line for line in re.split(r"[\r\n]", shown) if "step/s" in line]
    assert code == 0 and bars and all(len(line) <= 80 for line in bars)
    assert re.match(r"loss \d\.\d{4} val \d\.\d{4}: .*300", bars[-1])
    # elsewhere: `succeeded` finds an empty stderr in every other test

def test_of_a_large_text_evenly_spread_pieces_are_validated(call, succeeded, tmp_path, monkeypatch):
    monkeypatch.setattr(train_char, "MOST_VALIDATED", 20_000)
    data, out = tmp_path / "large", tmp_path / "out"
    data.write_text("".join(f"{k} times {k} is {k * k}\n" for k in range(18_000)))
    printed = succeeded(call("train_char.py", "--iters", 2, "--data", data, "--out", out))
    val, (params, config, _) = read_corpus(str(data), 8).val, load_checkpoint(out / "last.npz")
    assert f"{len(val):,} to validate (on 20,000 of them)" in printed and len(val) > 40_000
    expected = [validation_loss(params, config, piece) for piece in (val[:10_001], val[-10_001:])]
    assert float(log_of(out)[-1][2]) == pytest.approx(sum(expected) / 2, rel=1e-12)

def test_overfitting_is_named_once(call, succeeded, tmp_path, monkeypatch):
    losses = iter([3, 2, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6])
    monkeypatch.setattr(train_char, "validate", lambda run, signals: next(losses))
    options = ["--iters", 160, "--eval-every", 20, "--lr", 0.01, "--out", tmp_path]
    before, named, after = succeeded(call("train_char.py", *options)).partition("by heart")
    assert named and "by heart" not in after
    assert "step    100 " in before and "step    120 " not in before  # the third rise
    for train, val in (("321", "234"), ("0123", "1234"), ("3210", "1324")):
        log = [[0, int(a), int(b), 0, 0] for a, b in zip(train, val, strict=True)]
        assert not train_char.overfits(log)

def test_no_plot_of_a_run_that_was_stopped_at_once(tmp_path):
    train_char.plot(SimpleNamespace(progress=train_char.Progress(), out=tmp_path))
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize("trouble, fails", [
    ({"MPLBACKEND": "nonsense"}, True), ({"MPLCONFIGDIR": "latex"}, True),
    ({"MPLCONFIGDIR": "/dev/null/nowhere"}, False)])
def test_a_plot_that_fails_is_a_line(train, tmp_path, trouble, fails):
    """A backend that does not exist, LaTeX that is not installed, a cache that nobody can write."""
    (tmp_path / "latex").mkdir()
    (tmp_path / "latex" / "matplotlibrc").write_text("text.usetex: True\n")
    process = train("--iters", 1, out="out", cwd=tmp_path, env=os.environ | trouble | {"PATH": ""})
    assert process.returncode == 0 and "A sample:" in process.stdout
    assert ("\nno loss.png: " in process.stdout) == fails != (tmp_path / "out/loss.png").exists()
    assert "Traceback" not in process.stderr and not (fails and process.stderr)

@pytest.mark.parametrize("flags, expected", [
    ("--context 9 --n-layer 3 --d-model 12 --rank 4 --offsets 1,2;5;8 --normalize --positions "
     "--dropout 0.25", {"context": 9, "n_layer": 3, "d_model": 12, "rank": 4, "normalize": True,
                        "offsets": ((1, 2), (5,), (8,)), "positions": True, "dropout": 0.25}),
    ("--no-taps --block paper", {"taps": False, "block": "paper"}), ("--memory", {"memory": True}),
    ("--mixer attention --n-head 2 --d-ff 7", {"mixer": "attention", "n_head": 2, "d_ff": 7}),
    ("--paper --rank 4 --no-positions", {"block": "paper", "taps": False, "normalize": True,
        "positions": False, "d_ff": 32, "rank": 4, "offsets": ((1,), (2,))}),
    ("--paper --n-layer 6", {"block": "paper", "taps": False, "normalize": True, "positions": True,
        "n_layer": 6, "d_ff": 32, "offsets": ((1,), (2,), (4,), (1,), (1,), (1,))})])
def test_every_model_option_reaches_the_configuration(call, succeeded, tmp_path, flags, expected):
    succeeded(call("train_char.py", "--iters", 1, *flags.split(), "--out", tmp_path))
    _, config, _ = load_checkpoint(tmp_path / "best.npz")
    tiny = {"context": 8, "n_layer": 2, "d_model": 8, "rank": 3}
    assert config == Config(vocab_size=len(set(TEXT)), **tiny | expected)

def test_every_other_option_reaches_the_settings(call, succeeded, text, tmp_path):
    given = {"batch_size": 3, "iters": 2, "lr": 0.01, "min_lr": 0.005, "warmup_iters": 1,
             "weight_decay": 0.2, "grad_clip": 0.5, "eval_every": 1, "seed": 7}
    flags = (("--" + name.replace("_", "-"), value) for name, value in given.items())
    succeeded(call("train_char.py", *itertools.chain(*flags), "--out", tmp_path))
    settings = load_checkpoint(tmp_path / "last.npz")[2]["settings"]
    assert {name: settings[name] for name in given} == given and settings["data"] == [str(text)]
    assert [float(row[3]) for row in log_of(tmp_path)] == [0.005, 0.01]

@pytest.mark.parametrize("preset", train_char.PRESETS)
def test_presets(preset):
    """Each is a line of a table; an option beside it wins, and so does the paper's model."""
    own = train_char.PRESETS[preset][1]
    args = train_char.build_parser().parse_args(["--preset", preset, "--rank", "4"])
    run = train_char.make_run(args)
    expected = train_char.DEFAULTS | own | {"rank": 4}
    for name in expected.keys() - {"offsets", "d_ff"}:
        assert run.settings[name] == expected[name]
    assert run.config.offsets == own.get("offsets", default_offsets(4, 64, True))
    args = train_char.build_parser().parse_args(["--paper", "--preset", preset, "--normalize", "--no-positions"])
    run = train_char.make_run(args)
    paper = train_char.paper(run.config.n_layer, run.config.d_model, run.config.context) | {"positions": False}
    assert {name: getattr(run.config, name) for name in paper} == paper

@pytest.mark.parametrize("context", [2, 99])
def test_a_text_of_the_least_length_trains(call, succeeded, refused, tmp_path, context):
    """The length that the refusal of a shorter text asks for is enough."""
    short, out = tmp_path / "short", tmp_path / "out"
    short.write_text("ab")
    options = ["--mixer", "attention", "--n-head", 2, "--context", context, "--data", short]
    sentence = refused(call("train_char.py", "--iters", 1, *options, "--out", out))
    least = int(re.findall(r"\d+", sentence)[-1])
    short.write_text("ab" * (least // 2) + "a" * (least % 2))
    succeeded(call("train_char.py", "--iters", 1, *options, "--out", out))

@pytest.mark.parametrize("name", ["train_char.py", "sample.py"])
def test_help_lists_every_option_with_its_default(call, succeeded, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    options = succeeded(call(name, "--help")).partition("\noptions:")[2]
    assert max(map(len, options.splitlines())) <= 80
    found = re.findall(r"(?m)^  (--[\w-]+)(.*(?:\n   .*)*)", options)
    told = {flag: " ".join(rest.split()) for flag, rest in found}
    assert {flag for flag, text in told.items() if "(default: " not in text} <= {
        "--gpu", "--resume", "--version", "--paper", "--preset", "--escapes", "--interactive"}
    for setting, default in train_char.DEFAULTS.items() if name == "train_char.py" else ():
        assert f"(default: {default})" in told["--" + setting.replace("_", "-")] or default is None
    assert re.match(r"grassmann \d.*Python.*NumPy", succeeded(call(name, "--version")))

@pytest.mark.skipif(os.name != "posix", reason="the commands to copy are those of a shell")
@pytest.mark.parametrize("folder", ["$\\frac$ 模型, a=b;c", "-dash"])
def test_commands_run_as_they_are_printed(train, succeeded, plain, tmp_path, folder):
    printed = succeeded(train("--iters", 2, out=f"./{folder}", cwd=tmp_path))
    sampling, resuming = re.findall(r"(?:sample|go on) from: (.*)", printed)
    for command in (f"{sampling} --length 3", resuming):
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=plain, capture_output=True)
        assert done.returncode == 0, done
    assert load_checkpoint(tmp_path / folder / "last.npz")[2]["step"] == 4  # twice as many

def test_python_is_named_only_where_it_is_this_one(monkeypatch, tmp_path):
    ours, other = tmp_path / "ours" / "python", tmp_path / "other" / "python"
    for python in (ours, other):
        python.parent.mkdir()
        python.symlink_to(os.path.realpath(sys.executable))
    monkeypatch.setattr(sys, "executable", str(ours))
    monkeypatch.setattr(sys, "argv", ["../train_char.py"])
    for found, word in ((ours, "python"), (other, str(ours)), (None, str(ours))):
        monkeypatch.setattr(cli.shutil, "which", lambda name, found=found: found and str(found))
        assert shlex.split(cli.command("sample.py", Path("a b"))) == [word, "../sample.py", "a b"]

@pytest.mark.parametrize("name, package", [
    ("train_char.py", "numpy"), ("train_char.py", "tqdm"), ("sample.py", "numpy")])
def test_a_missing_package(program, without, name, package):
    process = program(name, env=without(package))
    install = f"-m pip install -r {ROOT / 'requirements.txt'}\n"
    assert (process.returncode, process.stdout) == (1, "") and process.stderr.count("\n") == 1
    assert process.stderr.startswith(f"{name}: {package} is not installed; ")
    assert process.stderr.endswith(install)

@pytest.mark.parametrize("package, file", [
    ("mpi4py", "requirements-parallel.txt"), ("jupytext", "experiments/requirements.txt"), ("elsewhere", None)])
def test_a_missing_package_of_other_programs(capsys, package, file):
    """What is to be installed is the file that names it, if any does."""
    cli.without_traceback(ModuleNotFoundError, ModuleNotFoundError(name=package), None)
    printed = capsys.readouterr().err
    assert f": {package} is not installed" in printed and ("pip install" in printed) == bool(file)
    assert file is None or printed.endswith(f"-r {ROOT / file}\n")

def test_an_old_python():
    old = f"import runpy, sys; sys.version_info = (3, 9); runpy.run_path({str(ROOT / 'cli.py')!r})"
    process = subprocess.run([sys.executable, "-c", old], capture_output=True, text=True)
    assert process.returncode == 1
    assert re.fullmatch(r"this needs Python 3\.10 or newer, not 3.*\n", process.stderr)

@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
@pytest.mark.parametrize("module", ["argparse", "numpy", "tqdm"])
def test_ctrl_c_during_the_imports(program, tmp_path, module):
    pressed = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"
    (tmp_path / f"{module}.py").write_text(pressed)
    process = program("train_char.py", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (process.returncode, process.stdout, process.stderr) == (-signal.SIGINT, "", "")

@pytest.mark.parametrize("name, make, message", [
    ("missing", lambda path: None, "No such file"), ("two\nlines", lambda path: None, "No such"),
    ("empty", lambda path: path.write_text(""), "the text has 0 characters"),
    ("only a mark", lambda path: path.write_bytes(b"\xef\xbb\xbf"), "the text has 0 characters"),
    ("binary", lambda path: path.write_bytes(bytes(range(256)) * 10), "text (byte 128 is 0x80)"),
    ("cut", lambda path: path.write_bytes(b"a" * 99 + b"\xc3"), "not UTF-8 text (byte 99 is 0xc3)"),
    ("UTF-16", lambda path: path.write_text(TEXT, "utf-16"), "iconv -f UTF-16 -t UTF-8"),
    ("in 'quotes'", lambda path: path.write_text("é" * 99, "latin-1"), "iconv -f WINDOWS-1252 -t UTF-8 '"),
    ("folder", lambda path: path.mkdir(), "no UTF-8 text in"),
    ("dangling", lambda path: path.symlink_to("nowhere"), "No such file"),
    ("circular", lambda path: path.symlink_to("circular"), "symbolic links"),
    ("endless", lambda path: path.symlink_to("/dev/zero"), "is larger than")])
def test_bad_texts(call, refused, tmp_path, monkeypatch, name, make, message):
    monkeypatch.setattr(texts, "MOST_BYTES", 10_000)
    make(bad := tmp_path / name)
    sentence = refused(call("train_char.py", "--data", bad, "--out", tmp_path / "out"))
    assert message in sentence and not (tmp_path / "out").exists()
    assert " ".join(str(bad).split()) in sentence or "characters" in sentence

@pytest.mark.parametrize("flags, message", [
    ("--offsets 0;1", "1 to context - 1"), ("--offsets 1;8", "1 to context - 1"),
    ("--offsets 1,1;2", "distinct"), ("--offsets 1", "one tuple per layer"),
    ("--offsets 1;x", "'1;x' is not of the form"), ("--rank 1", "1 is not between 2 and 10,000"),
    ("--mixer attention --n-head 3", "n_head must divide d_model"), ("--d-model 1000000", "memory"),
    ("--context 300000", "the text has 4,234 characters"), ("--context 1", "1 to context - 1"),
    ("--lr 0", "--lr: 0 is not above 0 and at most 10"), ("--lr nan", "nan"), ("--iter 5", "iter"),
    ("--lr 0.001 --min-lr 0.01", "--min-lr (0.01) must not exceed --lr (0.001)"),
    ("--dropout 1", "--dropout"), ("--iters 1.5", "'1.5' is not a whole number"),
    ("--iters 1e9", "'1e9' is not a whole number"), ("--iters 5000000000", "1 and 1,000,000,000"),
    (f"--seed {2**63}", "is not between 0 and 9,223,372,036,854,775,807"), ("stray", "stray"),
    ("--precision tf32", "--gpu"), ("--preset huge", "choose from")])
def test_bad_options(call, refused, tmp_path, flags, message):
    process = call("train_char.py", "--iters", 5, *flags.split(" "), "--out", tmp_path / "out")
    assert message in refused(process)
    assert process.stdout == "" and not (tmp_path / "out").exists()

@pytest.mark.parametrize("flags", ["--batch-size 1000000", "--mixer attention --n-head 1"])
def test_batches_larger_than_memory(call, refused, tmp_path, flags):
    (tmp_path / "text").write_text("ab" * 200_000)
    options = ["--context", 300_000, "--batch-size", 1, *flags.split(), "--data", tmp_path / "text"]
    assert "memory" in refused(call("train_char.py", *options, "--out", tmp_path / "out"))

def test_processes_of_one_machine_share_its_memory(monkeypatch):
    """Each has the model, and its rows of the batch."""
    monkeypatch.setattr(train_char.os, "sysconf", {"SC_PHYS_PAGES": 10**6, "SC_PAGE_SIZE": 1000}.get)  # 1 GB
    fits = Config(65, n_layer=8, d_model=640, context=8)
    train_char.check_memory(fits, 4, 1)
    monkeypatch.setattr(parallel, "size", 4)
    train_char.check_memory(fits, 4, 1)  # of four machines
    monkeypatch.setattr(parallel, "local_size", 4)
    with pytest.raises(ValueError, match="this needs about"):
        train_char.check_memory(fits, 4, 1)

def test_several_hundred_thousand_windows_a_step(call, succeeded, tmp_path):
    options = "--context 2 --d-model 2 --rank 2 --n-layer 1 --batch-size 300000 --iters 1"
    succeeded(call("train_char.py", *options.split(), "--out", tmp_path))

def test_no_more_threads(call, refused, tmp_path, monkeypatch):
    """As after ulimit -u."""
    failing = lambda thread: (_ for _ in ()).throw(RuntimeError("can't start new thread"))  # noqa: E731
    monkeypatch.setattr(training.ThreadPoolExecutor, "_adjust_thread_count", failing)
    process = call("train_char.py", "--threads", 2, "--iters", 1, "--out", tmp_path)
    assert refused(process) == "train_char.py: can't start new thread; --threads 1 needs none\n"

def test_output_folder_that_cannot_be_written(call, refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "under", tmp_path / ("x" * 300)):
        assert str(out) in refused(call("train_char.py", "--iters", 2, "--out", out))
    assert (tmp_path / "file").read_text() == "mine"

@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to RLIMIT_AS")
@pytest.mark.parametrize("what, most, width, message", [
    ("RLIMIT_FSIZE", 4096, 8, "File too large"), ("RLIMIT_AS", 600 << 20, 6000, "not enough memory")])
def test_limits_of_the_system(train, refused, tmp_path, what, most, width, message):
    """A write is refused half way, as on a full disk, and no half a file stays; an allocation fails
    that the machine has memory for."""
    import resource

    limit = lambda: resource.setrlimit(getattr(resource, what), (most, most))  # noqa: E731
    options = ["--iters", 2, "--n-layer", 1, "--d-model", width]
    assert message in refused(train(*options, out=tmp_path / "out", preexec_fn=limit))
    assert not list(tmp_path.glob("out/*"))

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("how", ["| head -1", "2>&1 | head -1", ">&-", "2>&-", ">/dev/full"])
def test_a_run_goes_on_when_nobody_reads(text, plain, tmp_path, how):
    options = [*MODEL, "--data", text, "--out", tmp_path, "--iters", "40", "--eval-every", "10"]
    command = shlex.join(map(str, [sys.executable, "-OO", ROOT / "train_char.py", *options]))
    shell = ["bash", "-o", "pipefail", "-c", f"{command} {how}"]
    process = subprocess.run(shell, capture_output=True, env=plain)
    full = b"standard output: No space left on device; going on without it\n" * ("full" in how)
    assert (process.returncode, process.stderr) == (0, full)
    assert load_checkpoint(tmp_path / "last.npz")[2]["step"] == 40

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
    step = int(re.search(r"at step (\d+): lower --lr", sentence)[1])
    assert load_checkpoint(tmp_path / "last.npz")[2]["step"] < step
    assert str(tmp_path / "last.npz") in sentence and np.isfinite(validated(tmp_path / "last.npz"))
    for file in tmp_path.glob("best.npz"):
        assert np.isfinite(load_checkpoint(file)[2]["best"][1])
    assert "nan" not in (tmp_path / "log.csv").read_text()

def test_parse_offsets():
    assert train_char.parse_offsets(" 1 , 2 ; 3 ") == ((1, 2), (3,))
    for given in ("", ";", "1;;2", "1,,2", "a", "1.0", "1;2;", "0x1"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not of the form"):
            train_char.parse_offsets(given)
