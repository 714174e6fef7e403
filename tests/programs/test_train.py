"""train_char.py: what a run leaves and prints, how options reach it, what is refused and how."""

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
import grassmann
import parallel
import text as texts
import train_char
from checkpoint import load_checkpoint
from grassmann import Config, default_offsets, generate, validation_loss
from text import decode, encode, read_corpus, vocabulary

FILES = ["best.npz", "last.npz", "log.csv", "loss.png"]
HOSTILE = "\x1b[2J\u202e"  # clears a screen and turns the direction of writing

def validated(checkpoint):
    """The validation loss of a checkpoint, on the last tenth of TEXT."""
    params, config, extra = load_checkpoint(checkpoint)
    return validation_loss(params, config, encode(TEXT, extra["vocab"])[-(len(TEXT) // 10) :])

def log_of(folder):
    header, *rows = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()]
    assert header == ["step", "train_loss", "val_loss", "lr", "seconds"]
    return rows

def made(*words):
    """The run that these options ask for; nothing is trained or written."""
    return train_char.make_run(train_char.build_parser().parse_args([*map(str, words)]))

# ---- what a run leaves -----------------------------------------------------------------------------

def test_a_run_leaves_a_log_a_picture_and_a_sample(trained, text):
    """A row every ten steps and at each validation; below it 70 characters that the model writes."""
    out, printed = trained
    assert sorted(file.name for file in out.iterdir()) == FILES
    rows, rate = log_of(out), train_char.Training(iters=30, lr=0.1, warmup_iters=0).rate
    assert [(row[0], bool(row[2])) for row in rows] == [("10", False), ("15", True), ("20", False), ("30", True)]
    for step, train_loss, val_loss, lr, seconds in rows:
        assert float(lr) == rate(int(step) - 1) and 0 < float(train_loss) < 4 and 0 < float(seconds) < 100
        assert not val_loss or 0 < float(val_loss) < 4
    picture = matplotlib.image.imread(out / "loss.png")
    assert len(np.unique(picture.reshape(-1, 4), axis=0)) > 10  # not an empty page
    head, written = printed.split("A sample:\n\n")
    assert head.startswith(f"{text}: 3,811 characters to train on, 423 to validate, 17 different ones\n")
    assert len(written) == 600 + 1 and set(written) <= set(TEXT)
    for name in FILES:
        assert str(out / name) in head
    params, config, extra = load_checkpoint(out / "last.npz")
    best = load_checkpoint(out / "best.npz")[2]["best"]
    assert f"best validation loss {best[1]:.4f} nats, {best[1] / np.log(2):.4f} bits" in head
    line = decode(generate(params, config, [extra["vocab"].index(10)], 70, 0.8, seed=0), extra["vocab"])
    shown = re.findall(r"(?m)^step +(\d+) .* nats/char .*\n  (.{70})$", printed)
    assert [step for step, _ in shown] == ["15", "30"]
    assert shown[1][1] == line.replace("\n", "⏎") != shown[0][1]

def test_checkpoints_hold_the_best_and_the_last_state(call, succeeded, tmp_path):
    """Of a run whose steps are so long that it gets better and worse."""
    restless = ["--lr", 0.3, "--min-lr", 0.3, "--warmup-iters", 0, "--iters", 15, "--eval-every", 1]
    assert "no loss.png" not in succeeded(call("train_char.py", *restless, "--out", tmp_path))
    losses = {int(row[0]): float(row[2]) for row in log_of(tmp_path)}
    assert list(losses) == list(range(1, 16))
    assert sorted(losses.values(), reverse=True) != list(losses.values())
    best, last = (load_checkpoint(tmp_path / name)[2] for name in ("best.npz", "last.npz"))
    assert validated(tmp_path / "best.npz") == losses[best["step"]] == min(losses.values())
    assert validated(tmp_path / "last.npz") == losses[15] and last["step"] == 15
    assert best["best"] == last["best"] == [best["step"], min(losses.values())]
    assert best["vocab"] == last["vocab"] == vocabulary(TEXT)
    assert {"adam_m", "adam_v"} <= last.keys() and not {"adam_m", "adam_v"} & best.keys()
    assert [["" if cell is None else str(cell) for cell in row] for row in last["log"]] == log_of(tmp_path)

def test_two_runs_are_equal_and_another_seed_is_not(call, succeeded, contents, trained, tmp_path):
    for seed, same in ((0, True), (2**63 - 1, False)):
        options = ["--iters", 30, "--eval-every", 15, "--lr", 0.1, "--warmup-iters", 0]
        succeeded(call("train_char.py", *options, "--seed", seed, "--out", tmp_path))
        assert (contents(tmp_path / "last.npz") == contents(trained[0] / "last.npz")) == same

def test_a_second_run_moves_the_first_one_aside(call, succeeded, refused, trained, tmp_path):
    """Files that are not ours stay; an impossible run moves nothing."""
    out = Path(shutil.copytree(trained[0], tmp_path / "out"))
    (out / "flow").mkdir()  # pictures of it
    (out / "notes.md").write_text("mine")
    before = {name: (out / name).read_bytes() for name in FILES}
    refused(call("train_char.py", "--context", 10**5, "--out", out))
    for number in (1, 2):
        assert {name: (out / name).read_bytes() for name in before} == before
        printed = succeeded(call("train_char.py", "--iters", 2, "--out", out))
        assert (moved := out / f"previous-{number}").name in printed
        assert {name: (moved / name).read_bytes() for name in before} == before
        before = {name: (out / name).read_bytes() for name in FILES[:3]}
    assert (out / "previous-1" / "flow").exists() and not (out / "flow").exists()
    assert (out / "notes.md").read_text() == "mine"

def test_files_of_others_are_never_moved(call, succeeded, refused, tmp_path):
    """In a folder without a run."""
    for name in ("explorer.html", "log.csv"):
        (tmp_path / name).write_text("mine")
    assert "no run" in refused(call("train_char.py", "--iters", 2, "--out", tmp_path))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["explorer.html", "log.csv"]
    assert (tmp_path / "log.csv").read_text() == "mine"
    (tmp_path / "log.csv").unlink()
    succeeded(call("train_char.py", "--iters", 2, "--out", tmp_path))
    assert (tmp_path / "explorer.html").read_text() == "mine" and not (tmp_path / "previous-1").exists()

def test_a_run_in_the_folder_of_its_text(call, succeeded, tmp_path):
    """What the programs write there is not read: the run resumes, and another one has the same text."""
    (tmp_path / "a.txt").write_text(TEXT)
    for how in (["--iters", 2], ["--resume", "--iters", 4], ["--iters", 2], ["--resume", "--iters", 3]):
        given = ["--data", tmp_path] * ("--resume" not in how)
        assert f"{len(TEXT) - len(TEXT) // 10:,} characters" in succeeded(
            call("train_char.py", *how, *given, "--out", tmp_path))
        (tmp_path / "log.csv.tmp").write_text("of a killed run")

def test_the_bar_fits_a_terminal_and_begins_with_the_losses(on_terminal, text, tmp_path):
    code, shown = on_terminal("train_char.py", *MODEL, "--iters", 300, "--data", text, "--out", tmp_path)
    bars = [line for line in re.split(r"[\r\n]", shown) if "step/s" in line]
    assert code == 0 and bars and all(len(line) <= 80 for line in bars)
    assert re.match(r"loss \d\.\d{4} best val \d\.\d{4}: .*300", bars[-1])

def test_of_a_large_text_evenly_spread_pieces_are_validated(call, succeeded, tmp_path, monkeypatch):
    for name, value in (("MOST_VALIDATED", 2_000), ("PIECE", 1_000)):
        monkeypatch.setattr(train_char, name, value)
    data, out = tmp_path / "large", tmp_path / "out"
    data.write_text("".join(f"{k} times {k} is {k * k}\n" for k in range(1_800)))
    succeeded(call("train_char.py", "--iters", 2, "--data", data, "--out", out))
    val, (params, config, _) = read_corpus(str(data), 8).val, load_checkpoint(out / "last.npz")
    expected = [validation_loss(params, config, piece) for piece in (val[:1_001], val[-1_001:])]
    assert len(val) > 4_000 and float(log_of(out)[-1][2]) == pytest.approx(sum(expected) / 2, rel=1e-12)

# ---- options ---------------------------------------------------------------------------------------

def test_no_option_is_lost():
    """These are the options of version 2."""
    options = "iters batch-size lr min-lr warmup-iters weight-decay grad-clip dropout eval-every seed context n-layer " \
              "d-model d-ff rank offsets block taps no-taps normalize no-normalize positions no-positions mixer n-head " \
              "memory no-memory data out preset paper resume threads gpu precision help version"
    known = train_char.build_parser()._option_string_actions
    assert {f"--{name}" for name in options.split()} <= known.keys()

def test_every_option_reaches_the_run(text):
    given = {"batch_size": 3, "iters": 2, "lr": 0.01, "min_lr": 0.005, "warmup_iters": 1, "weight_decay": 0.2,
             "grad_clip": 0.5, "eval_every": 1, "seed": 7, "context": 9, "n_layer": 3, "d_model": 12, "rank": 4,
             "d_ff": 7, "dropout": 0.25, "block": "paper", "offsets": "1,2;5;8"}
    flags = [word for name, value in given.items() for word in (train_char.flag(name), value)]
    run = made("--data", text, *flags, "--normalize", "--positions", "--memory", "--no-taps")
    expected = given | {"normalize": True, "positions": True, "memory": True, "taps": False,
                        "offsets": ((1, 2), (5,), (8,))}
    for name, value in expected.items():
        found = [getattr(place, name) for place in (run.config, run.training) if hasattr(place, name)]
        assert [value] == (found or [run.settings[name]]), name
    attention = made("--data", text, "--mixer", "attention", "--n-head", 2).config
    assert (attention.mixer, attention.n_head) == ("attention", 2)

@pytest.mark.parametrize("preset", train_char.PRESETS)
def test_presets(text, preset):
    """Each is a line of a table; an option beside it wins, and so does the model of the paper."""
    own = train_char.PRESETS[preset]
    run = made("--data", text, "--preset", preset, "--rank", 4)
    expected = train_char.DEFAULTS | own | {"rank": 4}
    for name in expected.keys() - {"offsets", "d_ff", "data"}:
        assert run.settings[name] == expected[name]
    assert run.config.offsets == own.get("offsets", default_offsets(4, 64, True))
    run = made("--data", text, "--paper", "--preset", preset, "--normalize", "--no-positions")
    paper = train_char.paper(run.config.n_layer, run.config.d_model, run.config.context) | {"positions": False}
    assert {name: getattr(run.config, name) for name in paper} == paper

def test_the_model_of_the_paper(text):
    config = made("--data", text, *MODEL, "--paper", "--n-layer", 6).config
    assert config == Config(17, 8, 6, 8, d_ff=32, rank=3, offsets=((1,), (2,), (4,), (1,), (1,), (1,)), block="paper",
                            taps=False, normalize=True, positions=True)

def test_options_that_would_be_ignored(call, refused, text, tmp_path):
    """They are refused, except those that a preset or --paper brings."""
    for words in ("--memory", "--no-memory", "--rank 3", "--taps", "--offsets 1", "--normalize"):
        process = call("train_char.py", "--mixer", "attention", *words.split(), "--out", tmp_path / "out")
        assert "is of no use with --mixer attention" in refused(process)
    assert "--n-head is of no use" in refused(call("train_char.py", "--n-head", 2, "--out", tmp_path / "out"))
    config = made("--data", text, "--preset", "best", "--paper", "--mixer", "attention").config
    assert (config.n_layer, config.block, config.taps) == (6, "paper", Config(2, 2).taps)

@pytest.mark.parametrize("context", [2, 99])
def test_a_text_of_the_least_length_trains(call, succeeded, refused, tmp_path, context):
    """The length that the refusal of a shorter text asks for is enough."""
    short, out = tmp_path / "short", tmp_path / "out"
    short.write_text("ab")
    given = ["--context", context, "--offsets", "1;1", "--data", short, "--out", out]
    least = int(re.findall(r"\d+", refused(call("train_char.py", "--iters", 1, *given)))[-1])
    short.write_text("ab" * (least // 2) + "a" * (least % 2))
    succeeded(call("train_char.py", "--iters", 1, *given))

@pytest.mark.parametrize("name", ["train_char.py", "sample.py"])
def test_help_lists_every_option_with_its_default(call, succeeded, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    options = succeeded(call(name, "--help")).partition("\noptions:")[2]
    assert max(map(len, options.splitlines())) <= 80
    found = re.findall(r"(?m)^  (--[\w-]+)(.*(?:\n   .*)*)", options)
    told = {flag: " ".join(rest.split()) for flag, rest in found}
    assert {flag for flag, text in told.items() if "(default: " not in text} <= {
        "--gpu", "--resume", "--version", "--paper", "--preset"}
    for setting, default in train_char.DEFAULTS.items() if name == "train_char.py" else ():
        assert f"(default: {default})" in told[train_char.flag(setting)] or default is None
    assert re.match(r"grassmann \d", succeeded(call(name, "--version")))

# ---- processes -------------------------------------------------------------------------------------

@pytest.mark.skipif(os.name != "posix", reason="the commands to copy are those of a shell")
def test_commands_run_as_they_are_printed(program, text, succeeded, plain, tmp_path):
    """In an odd folder, without matplotlib, and with a variable of a job that is not MPI's."""
    options = [*MODEL, "--data", text, "--iters", 2, "--threads", 1, "--out", "./-$\\frac$ 模型, a=b;c"]
    environment = plain | {"PMI_SIZE": "abc"}
    printed = succeeded(program("train_char.py", *options, cwd=tmp_path, env=environment))
    assert "\nno loss.png: ModuleNotFoundError" in printed
    for command in re.findall(r": (?:sample|go on) from it with (.*)", printed):
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=plain, capture_output=True)
        assert done.returncode == 0, done
    assert load_checkpoint(tmp_path / options[-1] / "last.npz")[2]["step"] == 4  # twice as many

def test_python_is_named_only_where_it_is_this_one(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/ours/python")
    monkeypatch.setattr(sys, "argv", ["../train_char.py"])
    for found, word in (("/ours/python", "python"), ("/other/python", "/ours/python"), (None, "/ours/python")):
        monkeypatch.setattr(cli.shutil, "which", lambda name, found=found: found)
        assert shlex.split(cli.command("sample.py", Path("a b"))) == [word, "../sample.py", "a b"]

def test_a_missing_package(program, without):
    for package, ranks, file in (("numpy", "1", "requirements.txt"), ("mpi4py", "2", "requirements-parallel.txt")):
        process = program("train_char.py", env=without(package) | {"PMI_SIZE": ranks})
        assert (process.returncode, process.stdout) == (1, "")
        install = f"No module named {package}; install it: {sys.executable} -m pip install -r {ROOT / file}\n"
        assert process.stderr == install

@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_ctrl_c_during_the_imports(program, tmp_path):
    (tmp_path / "numpy.py").write_text("import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)")
    process = program("train_char.py", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (process.returncode, process.stdout, process.stderr) == (-signal.SIGINT, "", "")

def test_ctrl_c_in_the_final_sample(call, tmp_path, monkeypatch):
    """It stops at once, and the run is saved."""
    def pressed(params, config, tokens, n, *args, **how):
        for k, token in enumerate(generate(params, config, tokens, n, *args, **how)):
            if (k, n) == (5, 600):
                signal.raise_signal(signal.SIGINT)
            yield token

    monkeypatch.setattr(grassmann, "generate", pressed)
    process = call("train_char.py", "--iters", 2, "--out", tmp_path)
    assert (process.returncode, process.stderr) == (130, "")
    assert len(process.stdout.split("A sample:\n\n")[1]) == 5
    assert load_checkpoint(tmp_path / "last.npz")[2]["step"] == 2

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("how", ["| head -1", ">/dev/full"])
def test_a_run_goes_on_when_nobody_reads(text, plain, tmp_path, how):
    options = [*MODEL, "--data", text, "--out", tmp_path, "--iters", "40", "--eval-every", "10"]
    command = shlex.join(map(str, [sys.executable, ROOT / "train_char.py", *options]))
    process = subprocess.run(["bash", "-o", "pipefail", "-c", f"{command} {how}"], capture_output=True, env=plain)
    assert (process.returncode, process.stderr) == (0, b"")
    assert load_checkpoint(tmp_path / "last.npz")[2]["step"] == 40

# ---- refusals --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, make, message", [
    ("missing", lambda path: None, "No such file"), (HOSTILE, lambda path: None, r"\x1b[2J\u202e: No such file"),
    ("empty", lambda path: path.write_text(""), "the text has 0 characters"),
    ("only a mark", lambda path: path.write_bytes(b"\xef\xbb\xbf"), "the text has 0 characters"),
    ("binary", lambda path: path.write_bytes(bytes(range(256)) * 10), "text (byte 128 is 0x80)"),
    ("UTF-16", lambda path: path.write_text(TEXT, "utf-16"), "iconv -f UTF-16 -t UTF-8"),
    ("in 'quotes'", lambda path: path.write_text("é" * 99, "latin-1"), "iconv -f WINDOWS-1252 -t UTF-8 '"),
    ("folder", lambda path: path.mkdir(), "no UTF-8 text in"),
    ("circular", lambda path: path.symlink_to("circular"), "symbolic links"),
    ("endless", lambda path: path.symlink_to("/dev/zero"), "is larger than")])
def test_bad_texts(call, refused, tmp_path, monkeypatch, name, make, message):
    monkeypatch.setattr(texts, "MOST_BYTES", 10_000)
    make(bad := tmp_path / name)
    assert message in refused(call("train_char.py", "--data", bad, "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()

@pytest.mark.parametrize("words, message", [
    ("--offsets 0;1", "offsets"), ("--offsets 1;8", "offsets"), ("--offsets 1", "offsets"), ("--offsets 1;x", "1;x"),
    ("--rank 1", "rank"), ("--d-model 1000000", "memory"),
    ("--batch-size 1000000000 --threads 100000000", "memory"), ("--context 300000", "the text has 4,234 characters"),
    ("--lr nan", "nan"), ("--lr -1", "lr"), ("--iter 5", "iter"), ("--dropout 1", "dropout"), ("--iters 1.5", "1.5"),
    ("--iters 0", "iters"), ("--eval-every 0", "--eval-every"), (f"--warmup-iters 1{'0' * 400}", "warmup_iters"),
    ("stray", "stray"), ("--data ", "--data needs the name"), ("--precision tf32", "--gpu"),
    ("--preset huge", "choose from"), ("--prompt -x", "unrecognized"), (f"--{HOSTILE}", r"\x1b[2J\u202e")])
def test_bad_options(call, refused, tmp_path, words, message):
    process = call("train_char.py", "--iters", 5, *words.split(" "), "--out", tmp_path / "out")
    assert message in refused(process)
    assert process.stdout == "" and not (tmp_path / "out").exists()

def test_ranks_of_one_machine_share_its_memory(monkeypatch):
    """Each has the model, and its rows of the batch."""
    monkeypatch.setattr(train_char.os, "sysconf", {"SC_PHYS_PAGES": 10**6, "SC_PAGE_SIZE": 1000}.get)  # 1 GB
    fits = Config(65, n_layer=8, d_model=640, context=8)
    train_char.check_memory(fits, 4, 1)
    monkeypatch.setattr(parallel, "size", 4)
    train_char.check_memory(fits, 4, 1)  # of four machines
    monkeypatch.setattr(parallel, "local_size", 4)
    with pytest.raises(grassmann.UserError, match="this needs about"):
        train_char.check_memory(fits, 4, 1)

def test_folders_that_cannot_be_written(call, refused, tmp_path, monkeypatch):
    """A file in the way, too long a name, a link into nothing, a working folder that somebody has deleted."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for out in ("file", "file/under", "x" * 300, "link"):
        assert str(tmp_path / out) in refused(call("train_char.py", "--iters", 2, "--out", tmp_path / out))
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "deleted").mkdir()
    monkeypatch.chdir(tmp_path / "deleted")
    (tmp_path / "deleted").rmdir()
    for options in ([], ["--data", "relative"]):
        assert "No such file" in refused(call("train_char.py", "--iters", 2, *options))

def test_names_of_files_are_escaped_in_all_that_is_printed(call, succeeded, tmp_path):
    """A name may hold what clears a screen: a folder of texts, and where a second run moves the first."""
    (folder := tmp_path / f"{HOSTILE}texts").mkdir()
    (folder / f"a.{HOSTILE}").write_text(TEXT)
    for _ in range(2):
        printed = succeeded(call("train_char.py", "--iters", 2, "--data", folder, "--out", tmp_path / HOSTILE))
        assert printed.replace("\n", "").isprintable() and r"\x1b[2J\u202etexts" in printed
    assert "previous-1" in printed

@pytest.mark.parametrize("words", ["--lr 10 --eval-every 10", "--lr 10 --eval-every 1 --block paper",
                                   "--lr 10 --eval-every 1000 --dropout 0.1"])
def test_a_loss_that_is_not_a_number_stops_the_run(call, refused, tmp_path, words):
    """It stops with the step named, and what it leaves is the last state that was still good."""
    diverging = "--grad-clip 0 --warmup-iters 0 --weight-decay 10 --iters 200"
    sentence = refused(call("train_char.py", *diverging.split(), *words.split(), "--out", tmp_path))
    step = re.search(r"(?:at|before) step (\d+): lower --lr", sentence)
    assert (step and load_checkpoint(tmp_path / "last.npz")[2]["step"] < int(step[1])) or "not finite" in sentence
    assert np.isfinite(validated(tmp_path / "last.npz"))
    for file in tmp_path.glob("best.npz"):
        assert np.isfinite(load_checkpoint(file)[2]["best"][1])
    assert "nan" not in (tmp_path / "log.csv").read_text()
