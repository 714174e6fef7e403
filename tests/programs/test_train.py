"""The two programs as their users meet them: real processes, tiny models, small texts."""

import argparse
import itertools
import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from kill_and_resume import ROOT, TEXT, contents

import cli
import runs
import train_char
from grassmann import Config, generate, init_params, learning_rate, load_checkpoint, save_checkpoint, validation_loss
from text import decode, encode, vocabulary

MODEL = "--context 8 --n-layer 2 --d-model 8 --rank 3 --batch-size 4 --threads 1"
as_root = hasattr(os, "geteuid") and os.geteuid() == 0


def program(name, *args, **how):
    """Run train_char.py or sample.py to its end; a string of several options may be one argument with spaces."""
    command = [sys.executable, str(ROOT / name), *(str(a) for a in args)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300, **how)


def train(*args, data, out, model=MODEL, **how):
    return program("train_char.py", *model.split(), "--data", data, "--out", out, *args, **how)


def succeeded(process):
    """The standard output of a program that had nothing to complain about."""
    assert (process.returncode, process.stderr) == (0, "")
    return process.stdout


def refused(process):
    """The one line with which a program stops. It must not be a traceback."""
    assert process.returncode == 2, process
    assert re.fullmatch(r"(train_char|sample)\.py: .+\n", process.stderr), process.stderr
    assert "Traceback" not in process.stderr and "None" not in process.stderr
    return process.stderr


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """A run of 30 steps: its folder and what it printed. Tests may read it, not change it."""
    out = tmp_path_factory.mktemp("run") / "out"
    return out, succeeded(train("--iters", 30, "--eval-every", 15, "--dropout", 0.1, data=text, out=out))


# ---- training -----------------------------------------------------------------------------------------


def test_training_leaves_four_files(trained):
    out, _ = trained
    assert sorted(file.name for file in out.iterdir()) == ["best.npz", "last.npz", "log.csv", "loss.png"]


def test_the_log_has_a_line_every_ten_steps_and_at_each_validation(trained):
    out, _ = trained
    header, *rows = [line.split(",") for line in (out / "log.csv").read_text(encoding="utf-8").splitlines()]
    assert header == runs.LOG_COLUMNS
    assert [(row[0], bool(row[2])) for row in rows] == [("10", False), ("15", True), ("20", False), ("30", True)]
    peak = runs.PACE_DEFAULTS["lr"]
    for step, train_loss, val_loss, lr, _ in rows:
        assert float(lr) == learning_rate(int(step) - 1, 30, peak, peak / 10, 100)
        assert 0 < float(train_loss) < 4 and (not val_loss or 0 < float(val_loss) < 4)


def test_the_plot_is_a_picture(trained):
    png = (trained[0] / "loss.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", png[16:24])
    picture = matplotlib.image.imread(trained[0] / "loss.png")
    assert picture.shape[:2] == (height, width) and height > 300 and width > 500
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 10  # not an empty page


def test_the_summary_names_losses_files_and_a_sample(trained):
    out, printed = trained
    summary, written = printed.split("A sample:\n\n")
    for name in ("best.npz", "last.npz"):
        params, config, extra = load_checkpoint(out / name)
        loss = validation_loss(params, config, encode(TEXT, extra["vocab"])[-(len(TEXT) // 10) :])
        line = f"{loss:.4f} nats, {loss / np.log(2):.4f} bits per character, at step {extra['step']}"
        assert f"{name[:4]} validation loss {line}" in summary
        assert str(out / name) in summary
    assert str(out / "log.csv") in summary and str(out / "loss.png") in summary
    assert len(written) == 600 + 1 and set(written) <= set(TEXT)
    assert "15   train" in summary and "30   train" in summary  # a line for each validation


def test_checkpoints_hold_the_best_and_the_last_state(text, tmp_path):
    """Of a run whose steps are so long that it gets better and worse."""
    restless = ["--lr", 0.3, "--min-lr", 0.3, "--warmup-iters", 0]
    succeeded(train("--iters", 15, "--eval-every", 1, *restless, data=text, out=tmp_path))
    losses = {}
    for line in (tmp_path / "log.csv").read_text(encoding="utf-8").splitlines()[1:]:
        step, _, val_loss, *_ = line.split(",")
        if val_loss:
            losses[int(step)] = float(val_loss)
    assert list(losses) == list(range(1, 16)) and sorted(losses.values(), reverse=True) != list(losses.values())
    best, last = load_checkpoint(tmp_path / "best.npz"), load_checkpoint(tmp_path / "last.npz")
    for params, config, extra in (best, last):
        validation = encode(TEXT, extra["vocab"])[-(len(TEXT) // 10) :]
        assert validation_loss(params, config, validation) == losses[extra["step"]]
    best, last = best[2], last[2]
    assert best["best"] == last["best"] == [best["step"], min(losses.values())] and last["step"] == 15
    assert best["vocab"] == last["vocab"] == vocabulary(TEXT)
    assert {"adam_m", "adam_v"} <= last.keys() and not {"adam_m", "adam_v"} & best.keys()


def test_default_text_is_pythons_documentation(tmp_path):
    printed = succeeded(program("train_char.py", *MODEL.split(), "--iters", 2, "--out", tmp_path))
    characters = int(re.match(r"([\d,]+) characters to train on", printed)[1].replace(",", ""))
    assert characters > 100_000
    assert "A sample:" in printed


def test_two_runs_are_equal_and_another_seed_is_not(text, trained, tmp_path):
    for seed, same in ((0, True), (1, False)):
        succeeded(train("--iters", 30, "--eval-every", 15, "--dropout", 0.1, "--seed", seed, data=text, out=tmp_path))
        assert (contents(tmp_path / "last.npz") == contents(trained[0] / "last.npz")) == same


def test_a_second_run_moves_the_first_one_aside(text, trained, tmp_path):
    out, files = tmp_path / "out", ["best.npz", "last.npz", "log.csv", "loss.png"]
    shutil.copytree(trained[0], out)
    (out / "flow").mkdir()  # flow.py's pictures of it
    (out / "flow" / "map.png").write_bytes(b"")
    for number in (1, 2):
        before = {name: (out / name).read_bytes() for name in files}
        assert str(out / f"previous-{number}") in succeeded(train("--iters", 2, data=text, out=out))
        moved = [file for file in (out / f"previous-{number}").iterdir() if file.is_file()]
        assert {file.name: file.read_bytes() for file in moved} == before
        assert not (out / "flow").exists()
        assert sorted(f.name for f in out.iterdir() if f.is_file()) == files
    assert (out / "previous-1" / "best.npz").read_bytes() == (trained[0] / "best.npz").read_bytes()
    assert (out / "previous-1" / "flow" / "map.png").exists()


def test_a_refused_run_leaves_the_earlier_one_alone(text, trained):
    out, _ = trained
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    refused(train("--iters", 2, "--context", 10**5, data=text, out=out))
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_progress_bar_only_on_a_terminal(text, tmp_path):
    pty = pytest.importorskip("pty")
    import fcntl
    import termios

    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # lines and columns
    command = [sys.executable, ROOT / "train_char.py", *MODEL.split(), "--iters", "3"]
    command += ["--data", text, "--out", tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=terminal)
    os.close(terminal)
    shown = b""
    try:
        while chunk := os.read(ours, 10_000):
            shown += chunk
    except OSError:  # how Linux says that nobody holds the other end any more
        pass
    os.close(ours)
    assert process.wait() == 0
    assert b"3/3" in shown
    # elsewhere: `succeeded` finds an empty stderr in every other test


# ---- options reach the model --------------------------------------------------------------------------


@pytest.mark.parametrize("flags, expected", [
    ("--context 9 --n-layer 3 --d-model 12 --rank 4 --offsets 1,2;5;8 --normalize --positions --dropout 0.25",
     {"context": 9, "n_layer": 3, "d_model": 12, "rank": 4, "offsets": ((1, 2), (5,), (8,)), "normalize": True,
      "positions": True, "dropout": 0.25, "d_ff": 24}),
    ("--no-taps --block paper", {"taps": False, "block": "paper", "offsets": ((1,), (2,))}),
    ("--mixer attention --n-head 2", {"mixer": "attention", "n_head": 2, "d_ff": 32}),
])  # fmt: skip
def test_every_model_option_reaches_the_configuration(text, tmp_path, flags, expected):
    succeeded(train("--iters", 1, *flags.split(), data=text, out=tmp_path))
    _, config, extra = load_checkpoint(tmp_path / "best.npz")
    defaults = {"context": 8, "n_layer": 2, "d_model": 8, "d_ff": 16, "rank": 3, "dropout": 0.1}
    defaults["offsets"] = ((1, 2, 3, 4), (1, 2, 4))
    assert config == Config(vocab_size=len(set(TEXT)), **defaults | expected)
    for name, value in expected.items():
        assert json.dumps(extra["settings"][name]) == json.dumps(value)


def test_every_other_option_reaches_the_settings(text, tmp_path):
    given = {
        "batch_size": 3, "iters": 2, "lr": 0.01, "min_lr": 0.005, "warmup_iters": 1, "weight_decay": 0.2,
        "grad_clip": 0.5, "eval_every": 1, "seed": 7,
    }  # fmt: skip
    flags = itertools.chain(*(("--" + name.replace("_", "-"), value) for name, value in given.items()))
    succeeded(train(*flags, data=text, out=tmp_path))
    settings = load_checkpoint(tmp_path / "last.npz")[2]["settings"]
    assert {name: settings[name] for name in given} == given
    assert settings["data"] == str(text)
    rates = [float(line.split(",")[3]) for line in (tmp_path / "log.csv").read_text(encoding="utf-8").splitlines()[1:]]
    assert rates == [0.005, 0.01]


@pytest.mark.parametrize("flags, offsets", [
    ("--n-layer 3", [(1, 2, 3, 4), (1, 2, 3, 4, 5, 6), (1, 2, 4, 8)]),
    ("--n-layer 6 --no-taps", [(1,), (2,), (4,), (8,), (1,), (2,)]),
    ("--n-layer 2 --context 2", [(1,), (1,)]),
    ("--n-layer 3 --no-taps --context 2", [(1,)] * 3),
])  # fmt: skip
def test_offsets_follow_from_the_other_options(text, tmp_path, flags, offsets):
    model = "--d-model 8 --rank 3 --batch-size 4 --threads 1 --context 12"
    succeeded(train("--iters", 1, *flags.split(), data=text, out=tmp_path, model=model))
    assert load_checkpoint(tmp_path / "best.npz")[1].offsets == tuple(offsets)


@pytest.mark.parametrize("context", [2, 99])
def test_a_text_of_the_least_length_trains(tmp_path, context):
    """The length that the refusal of a shorter text asks for is enough."""
    short, long, flags = tmp_path / "short", tmp_path / "long", ["--iters", 1, "--mixer", "attention", "--n-head", 2]
    short.write_text("ab")
    message = refused(train(*flags, "--context", context, data=short, out=tmp_path / "out"))
    least = int(re.findall(r"\d+", message)[-1])
    long.write_text("ab" * (least // 2) + "a" * (least % 2))
    succeeded(train(*flags, "--context", context, data=long, out=tmp_path / "out"))


def option_help(name):
    """Flag -> its help text, from --help."""
    printed = succeeded(program(name, "--help", env=os.environ | {"COLUMNS": "200"}))
    return printed, {m[1]: " ".join(m[2].split()) for m in re.finditer(r"(?m)^  (--[\w-]+)(.*(?:\n   .*)*)", printed)}


def test_help_lists_every_option_with_its_default():
    printed, texts = option_help("train_char.py")
    assert [group for group in ("the run:", "training:", "the model:") if f"\n{group}\n" in printed] == [
        "the run:", "training:", "the model:"]  # fmt: skip
    for name, default in (runs.MODEL_DEFAULTS | runs.PACE_DEFAULTS).items():
        text = texts["--" + name.replace("_", "-")]
        assert f"(default: {default})" in text if default is not None else "(default: " in text
    assert "(default: " in texts["--out"] and "(default: " in texts["--threads"]
    assert {"--resume", "--gpu"} <= texts.keys()
    parser = train_char.build_parser()
    flags = {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}
    assert {flag for flag in flags if flag not in printed} == set()


def test_help_of_sample_lists_every_option_with_its_default():
    printed, texts = option_help("sample.py")
    assert texts.keys() >= {"--prompt", "--length", "--temperature", "--top-k", "--seed", "--samples", "--gpu"}
    assert {flag for flag, text in texts.items() if "(default: " not in text} <= {"--gpu"}
    assert "(default: out/best.npz)" in printed.replace("\\", "/")


# ---- sampling -----------------------------------------------------------------------------------------


def sampled(checkpoint, *args, **how):
    return succeeded(program("sample.py", checkpoint, *args, **how))


def test_sample_prints_the_prompt_and_what_generate_draws(trained):
    params, config, extra = load_checkpoint(trained[0] / "best.npz")
    prompt = encode("12 times", extra["vocab"])
    tokens = generate(params, config, prompt, 70, temperature=1.2, top_k=5, seed=3)
    flags = ["--prompt", "12 times", "--length", 70, "--temperature", 1.2, "--top-k", 5, "--seed", 3]
    assert sampled(trained[0] / "best.npz", *flags) == "12 times" + decode(tokens, extra["vocab"]) + "\n"


def test_an_empty_prompt_starts_a_line(trained):
    params, config, extra = load_checkpoint(trained[0] / "last.npz")
    tokens = generate(params, config, [extra["vocab"].index(ord("\n"))], 50, temperature=0.8, seed=0)
    written = sampled(trained[0] / "last.npz", "--prompt", "", "--length", 50)
    assert written == decode(tokens, extra["vocab"]) + "\n" == sampled(trained[0] / "last.npz", "--length", 50)


def test_several_samples_are_those_of_consecutive_seeds(trained):
    best = trained[0] / "best.npz"
    alone = [sampled(best, "--length", 40, "--seed", seed) for seed in (5, 6, 7)]
    assert len(set(alone)) == 3
    assert sampled(best, "--length", 40, "--seed", 5, "--samples", 3) == ("-" * 40 + "\n").join(alone)


def test_temperature_zero_and_top_1_leave_no_choice(trained):
    best = trained[0] / "best.npz"
    greedy = sampled(best, "--length", 40, "--temperature", 0)
    assert sampled(best, "--length", 40, "--temperature", 0, "--seed", 9) == greedy
    assert sampled(best, "--length", 40, "--top-k", 1, "--seed", 9) == greedy
    assert sampled(best, "--length", 40, "--temperature", 1e-300) == greedy


def test_length_zero_and_the_default_place(trained):
    assert sampled("--prompt", "3 times", "--length", 0, cwd=trained[0].parent) == "3 times\n"


def test_characters_appear_as_they_are_drawn(trained):
    """The pipe is read while the program, which would never end, writes: the first characters are there at once.
    (Were they held back, they would come by the thousand, when the buffer is full.)"""
    command = [sys.executable, ROOT / "sample.py", trained[0] / "best.npz", "--length", str(10**9), "--prompt", "7"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as process:
        first = os.read(process.stdout.fileno(), 10**6)
        second = os.read(process.stdout.fileno(), 10**6)
        running = process.poll() is None
        process.kill()
    assert running and first.startswith(b"7") and 0 < len(first + second) < 1000


@pytest.mark.parametrize("name", ["train_char.py", "sample.py"])
def test_a_reader_may_leave_early(trained, text, tmp_path, name):
    """As `head` does."""
    options = f"{MODEL} --iters 1000000 --eval-every 1 --data {text} --out {tmp_path}"
    options = options.split() if name == "train_char.py" else [trained[0] / "best.npz", "--length", str(10**9)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, ROOT / name, *options], **pipes) as process:
        os.read(process.stdout.fileno(), 10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


# ---- bad input ----------------------------------------------------------------------------------------


def unreadable(path):
    if as_root:
        pytest.skip("root may read a file without permissions")
    path.write_text(TEXT)
    path.chmod(0)


BAD_TEXTS = {
    "missing": (lambda path: None, "No such file"),
    "empty": (lambda path: path.write_text(""), "the text has 0 characters"),
    "three bytes": (lambda path: path.write_text("abc"), "the text has 3 characters"),
    "byte order mark only": (lambda path: path.write_bytes(b"\xef\xbb\xbf"), "the text has 0 characters"),
    "binary": (lambda path: path.write_bytes(bytes(range(256)) * 10), "is not UTF-8 text (byte 128 is 0x80)"),
    "cut character": (lambda path: path.write_bytes(b"a" * 99 + b"\xc3"), "is not UTF-8 text (byte 99 is 0xc3)"),
    "UTF-16": (lambda path: path.write_text(TEXT, encoding="utf-16"), "is not UTF-8 text (byte 0 is "),
    "folder": (lambda path: path.mkdir(), "Is a directory"),
    "dangling link": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "circular link": (lambda path: path.symlink_to("bad"), "symbolic links"),
    "unreadable": (unreadable, "Permission denied"),
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_bad_texts(tmp_path, kind):
    make, message = BAD_TEXTS[kind]
    make(tmp_path / "bad")
    sentence = refused(train(data=tmp_path / "bad", out=tmp_path / "out"))
    assert message in sentence
    assert str(tmp_path / "bad") in sentence or "characters" in sentence
    assert not (tmp_path / "out").exists()


def test_a_line_break_in_a_name_does_not_break_the_line(tmp_path):
    refused(train(data=tmp_path / "two\nlines", out=tmp_path / "out"))
    refused(program("train_char.py", "two\nlines"))
    refused(program("sample.py", "two\nlines"))


BAD_OPTIONS = [
    # how far back
    ("--offsets 0;1", "positive"), ("--offsets=-1;1", "positive"), ("--offsets 1,1;2", "distinct"),
    ("--offsets 1;8", "smaller than the context"), ("--offsets 1;2,999999999999999999999", "smaller than the context"),
    ("--offsets 1", "one tuple per layer"), ("--offsets 1;2;3", "one tuple per layer"),
    ("--offsets 1;x", "'1;x'"), ("--offsets 1;", "'1;'"), ("--offsets 1,;2", "'1,;2'"), ("--offsets 1.5;2", "'1.5;2'"),
    ("--offsets=", "''"), ("--context 1", "smaller than the context"),
    # sizes
    ("--rank 1", "--rank"), ("--rank 0", "--rank"), ("--rank -3", "--rank"), ("--n-layer 0", "--n-layer"),
    ("--d-model 0", "--d-model"), ("--context 0", "--context"), ("--batch-size 0", "--batch-size"),
    ("--n-head 0", "--n-head"), ("--mixer attention --n-head 3", "n_head (3) must divide d_model (8)"),
    ("--d-model 1000000", "memory"), ("--rank 10000 --d-model 128", "memory"),
    ("--n-layer 1000 --d-model 4096", "memory"),
    ("--mixer attention --d-model 1000000", "memory"), ("--d-model 99999999999999999999", "--d-model"),
    ("--n-layer 1e3", "--n-layer"), ("--context 1000000", "characters"),
    # numbers
    ("--lr 0", "--lr"), ("--lr -1", "--lr"), ("--lr 11", "--lr"), ("--lr nan", "--lr"), ("--lr inf", "--lr"),
    ("--lr fast", "--lr"), ("--lr 0.001 --min-lr 0.01", "--min-lr (0.01) must not exceed --lr (0.001)"),
    ("--min-lr -1", "--min-lr"), ("--min-lr nan", "--min-lr"), ("--min-lr 1", "--min-lr"),
    ("--dropout 1", "--dropout"), ("--dropout -0.1", "--dropout"), ("--dropout nan", "--dropout"),
    ("--weight-decay -1", "--weight-decay"), ("--weight-decay inf", "--weight-decay"),
    ("--grad-clip -1", "--grad-clip"), ("--grad-clip nan", "--grad-clip"), ("--iters 0", "--iters"),
    ("--iters -5", "--iters"), ("--iters 1.5", "--iters"), ("--iters many", "--iters"),
    ("--warmup-iters -1", "--warmup-iters"), ("--eval-every 0", "--eval-every"),
    ("--seed -1", "--seed"), ("--seed x", "--seed"), ("--seed 99999999999999999999", "--seed"),
    ("--threads 0", "--threads"), ("--threads 99999", "--threads"),
    # words
    ("--block new", "--block"), ("--mixer blender", "--mixer"), ("--itres 5", "--itres"), ("--iter 5", "--iter"),
    ("--lr", "--lr"), ("stray", "stray"), ("--precision tf32", "--gpu"),
    ("--gpu --precision half", "--precision"),
]  # fmt: skip


@pytest.mark.parametrize("flags, message", BAD_OPTIONS)
def test_bad_options(text, tmp_path, flags, message):
    process = train("--iters", 5, *flags.split(" "), data=text, out=tmp_path / "out")
    assert message in refused(process)
    assert process.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", ["--batch-size 1000000", "--mixer attention --batch-size 1 --n-head 1"])
def test_batches_larger_than_memory(tmp_path, flags):
    process = program("train_char.py", "--context", 300_000, *flags.split(), "--out", tmp_path / "out")
    assert "memory" in refused(process)
    assert not (tmp_path / "out").exists()


BAD_SAMPLING = [
    ("--length -1", "--length"), ("--length x", "--length"), ("--temperature -1", "--temperature"),
    ("--temperature nan", "--temperature"), ("--temperature inf", "--temperature"), ("--top-k 0", "--top-k"),
    ("--samples 0", "--samples"), ("--seed -1", "--seed"), ("--prompt", "--prompt"), ("--wild", "--wild"),
    ("--precision tf32", "--gpu"), ("--prompt Ω", "'\\u03a9'"), ("--prompt 12é🙂", "'\\xe9' '\\U0001f642'"),
]  # fmt: skip


@pytest.mark.parametrize("flags, message", BAD_SAMPLING)
def test_bad_options_of_sample(trained, flags, message):
    process = program("sample.py", trained[0] / "best.npz", *flags.split(" "))
    assert message in refused(process)
    assert process.stdout == ""


def test_a_prompt_that_is_not_text(trained):
    """Bytes that are no UTF-8 on the command line."""
    command = [sys.executable, ROOT / "sample.py", trained[0] / "best.npz", "--prompt", b"12\xff"]
    assert r"'\udcff'" in refused(subprocess.run(command, capture_output=True, text=True))


def no_checkpoint(path):
    pass


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def another_version(path):
    with np.load(path) as file:
        arrays = dict(file)
    meta = json.loads(arrays["meta"].tobytes()) | {"format": 999}
    np.savez(path, **arrays | {"meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)})


def pickled(path):
    path.write_bytes(b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins\x8c\x04eval\x93.")


def not_from_training(path):
    config = Config(vocab_size=5, context=4, n_layer=1, d_model=4, rank=2, offsets=((1,),))
    save_checkpoint(path, init_params(config), config)


BAD_CHECKPOINTS = {
    "missing": (lambda path: path.unlink(), "does not exist"),
    "empty": (lambda path: path.write_bytes(b""), "not a usable checkpoint"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
    "text": (lambda path: path.write_text(TEXT), "not a usable checkpoint"),
    "cut in half": (cut_in_half, "not a usable checkpoint"),
    "another version": (another_version, "999"),
    "pickle": (pickled, "not a usable checkpoint"),
    "not from training": (not_from_training, ""),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_bad_checkpoints(trained, tmp_path, kind):
    make, message = BAD_CHECKPOINTS[kind]
    last = tmp_path / "last.npz"
    last.write_bytes((trained[0] / "last.npz").read_bytes())
    make(last)
    for process in (program("sample.py", last), program("train_char.py", "--resume", "--iters", 99, "--out", tmp_path)):
        sentence = refused(process)
        assert message in sentence and str(last) in sentence
        assert process.stdout == ""


# ---- what --resume refuses ----------------------------------------------------------------------------


CHANGED = [
    ("--context 7", "--context"), ("--n-layer 3", "--n-layer"), ("--d-model 16", "--d-model"), ("--rank 4", "--rank"),
    ("--offsets 1;2", "--offsets"), ("--block paper", "--block"), ("--no-taps", "--taps"),
    ("--normalize", "--normalize"), ("--positions", "--positions"), ("--mixer attention", "--mixer"),
    ("--n-head 2", "--n-head"), ("--dropout 0.2", "--dropout"), ("--seed 1", "--seed"),
    ("--batch-size 5", "--batch-size"),
    ("--weight-decay 0.3", "--weight-decay"), ("--grad-clip 0", "--grad-clip"), ("--data shakespeare", "--data"),
]  # fmt: skip


@pytest.mark.parametrize("flags, name", CHANGED)
def test_resume_refuses_another_model_by_name(trained, flags, name):
    process = program("train_char.py", "--resume", "--iters", 99, "--out", trained[0], *flags.split())
    assert f"--resume cannot change {name}:" in refused(process)


def test_resume_refuses_what_it_cannot_do(trained, text, tmp_path):
    out, _ = trained
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert "nothing to resume" in refused(program("train_char.py", "--resume", "--out", tmp_path / "nowhere"))
    for iters in ([], ["--iters", 30], ["--iters", 29]):
        sentence = refused(program("train_char.py", "--resume", "--out", out, *iters))
        assert "is at step 30" in sentence and "--iters" in sentence
    min_lr = program("train_char.py", "--resume", "--out", out, "--iters", 99, "--min-lr", 1)
    assert "--min-lr (1.0) must not exceed --lr (0.003)" in refused(min_lr)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_resume_refuses_another_text(tmp_path):
    text = tmp_path / "text"
    text.write_text(TEXT)
    succeeded(train("--iters", 2, data=text, out=tmp_path / "out"))
    resume = ["train_char.py", "--resume", "--iters", 4, "--out", tmp_path / "out"]
    text.write_text(TEXT.replace("7", "8", 1))
    assert f"--resume cannot change the text, and {text} has changed" in refused(program(*resume))
    text.unlink()
    assert f"cannot read {text}" in refused(program(*resume))


def test_resume_takes_the_same_options_again(trained, text, tmp_path):
    """The whole command line may be repeated, with --resume and more --iters."""
    for name in ("last.npz", "best.npz", "log.csv"):
        (tmp_path / name).write_bytes((trained[0] / name).read_bytes())
    succeeded(train("--resume", "--iters", 40, "--eval-every", 15, "--dropout", 0.1, data=text, out=tmp_path))
    assert load_checkpoint(tmp_path / "last.npz")[2]["step"] == 40


# ---- where it cannot write ----------------------------------------------------------------------------


def test_output_folder_that_cannot_be_written(text, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "under", tmp_path / ("x" * 300)):
        assert str(out) in refused(train("--iters", 2, data=text, out=out))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(as_root, reason="root may write into a read-only folder")
def test_read_only_output_folder(text, tmp_path):
    tmp_path.chmod(0o555)
    assert str(tmp_path) in refused(train("--iters", 2, data=text, out=tmp_path))
    assert str(tmp_path) in refused(train("--iters", 2, data=text, out=tmp_path / "new"))
    tmp_path.chmod(0o755)


def test_checkpoint_larger_than_files_may_be(text, tmp_path):
    """The system refuses the write half way, as a full disk does; no half-written file stays."""
    resource = pytest.importorskip("resource")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # noqa: E731
    sentence = refused(train("--iters", 2, data=text, out=tmp_path / "out", preexec_fn=limit))
    assert str(tmp_path / "out") in sentence
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name", ["train_char.py", "sample.py"])
def test_output_into_a_full_disk(trained, text, tmp_path, name):
    command = [sys.executable, ROOT / name]
    command += [trained[0] / "best.npz"] if name == "sample.py" else ["--data", text, "--out", tmp_path, "--iters", "2"]
    with open("/dev/full", "w") as full:
        sentence = refused(subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True))
    assert "No space left on device" in sentence and "best.npz" not in sentence


@pytest.mark.parametrize("folder", ["$\\frac$", "Größe 模型, a=b;c", "-dash"])
def test_output_folders_with_odd_names(text, tmp_path, folder):
    printed = succeeded(train("--iters", 2, data=text, out=f"./{folder}", cwd=tmp_path))
    assert f"{folder}{os.sep}best.npz" in printed
    assert (tmp_path / folder / "loss.png").stat().st_size > 0
    if os.name == "posix":  # the commands to copy are those of a shell
        sampling, resuming = (re.search(f"python {name}.*", printed)[0] for name in ("sample.py", "train_char.py"))
        assert Path(shlex.split(sampling)[2]) == Path(folder, "best.npz")
        assert Path(shlex.split(resuming)[4]) == Path(folder)


@pytest.mark.skipif(os.name != "posix", reason="closed by a POSIX shell")
@pytest.mark.parametrize("stream", ["1>&-", "2>&-"])
def test_closed_streams(trained, text, tmp_path, stream):
    """A program without output or error stream does its work all the same."""
    for name, options in (("sample.py", [trained[0] / "best.npz"]),
                          ("train_char.py", ["--data", text, "--out", tmp_path, "--iters", "2"])):  # fmt: skip
        command = shlex.join(map(str, [sys.executable, ROOT / name, *options]))
        process = subprocess.run(f"{command} {stream}", shell=True, capture_output=True, text=True)
        assert (process.returncode, process.stderr) == (0, "")
    assert (tmp_path / "best.npz").exists()


# ---- numbers that go wrong ----------------------------------------------------------------------------


DIVERGING = "--grad-clip 0 --warmup-iters 0 --weight-decay 10 --iters 200"


@pytest.mark.parametrize("flags", [
    "--lr 10 --eval-every 10", "--lr 10 --eval-every 1", "--lr 10 --eval-every 1 --block paper",
    "--lr 1 --eval-every 1 --mixer attention", "--lr 10 --eval-every 1 --block paper --mixer attention",
    "--lr 10 --eval-every 3 --no-taps --normalize", "--lr 10 --eval-every 1000 --dropout 0.1",
])  # fmt: skip
def test_a_loss_that_is_not_a_number_stops_the_run(text, tmp_path, flags):
    """It stops with the step named, and what it leaves is the last state that was still good."""
    process = train(*DIVERGING.split(), *flags.split(), data=text, out=tmp_path)
    sentence = refused(process)
    assert re.search(r"at step \d+: lower --lr", sentence) and str(tmp_path / "last.npz") in sentence
    params, config, extra = load_checkpoint(tmp_path / "last.npz")
    assert extra["step"] < int(re.search(r"at step (\d+)", sentence)[1])
    with np.errstate(over="ignore", invalid="ignore"):
        loss = validation_loss(params, config, encode(TEXT, extra["vocab"])[-(len(TEXT) // 10) :])
    assert np.isfinite(loss)
    for file in tmp_path.glob("best.npz"):
        assert np.isfinite(load_checkpoint(file)[2]["best"][1])
    assert "nan" not in (tmp_path / "log.csv").read_text(encoding="utf-8")


def test_weights_that_overflow_in_sampling(tmp_path):
    """Finite weights of a model that has diverged, whose logits are not finite."""
    config = Config(vocab_size=5, context=4, n_layer=1, d_model=4, rank=2, offsets=((1,),))
    params = {name: np.full_like(value, 1e37) for name, value in init_params(config).items()}
    save_checkpoint(tmp_path / "huge.npz", params, config, vocab=list(range(97, 102)), most_common=0)
    refused(program("sample.py", tmp_path / "huge.npz"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps to RLIMIT_AS")
def test_too_little_memory(text, tmp_path):
    """What the process may use, not what the machine has: found out only when an allocation fails."""
    import resource

    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))  # noqa: E731
    large = ["--d-model", 6000, "--n-layer", 1]
    assert "memory" in refused(train(*large, data=text, out=tmp_path, preexec_fn=limit))


# ---- functions, without a process ---------------------------------------------------------------------


@pytest.mark.parametrize("text, layers", [("1", ((1,),)), ("1,2;4", ((1, 2), (4,))), (" 1 , 2 ; 3 ", ((1, 2), (3,)))])
def test_parse_offsets(text, layers):
    assert train_char.parse_offsets(text) == layers


@pytest.mark.parametrize("text", ["", ";", "1;;2", "1,,2", "a", "1.0", "1;2;", "0x1"])
def test_parse_offsets_refuses(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not of the form"):
        train_char.parse_offsets(text)


@pytest.mark.parametrize("above, accepted, rejected", [
    (False, ["0", "10", "2.5"], ["-1e-9", "10.1", "nan", "inf", "", "x"]),
    (True, ["1e-300", "10"], ["0", "-0.0"]),
])  # fmt: skip
def test_number(above, accepted, rejected):
    parse = cli.number(float, 0, 10, above=above)
    assert [parse(text) for text in accepted] == [float(text) for text in accepted]
    for text in rejected:
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


def test_default_offsets_always_make_a_configuration():
    for n_layer, context, taps in itertools.product((1, 2, 7), (2, 3, 5, 16), (True, False)):
        offsets = runs.default_offsets(n_layer, context, taps)
        config = Config(vocab_size=3, context=context, n_layer=n_layer, d_model=4, rank=2, offsets=offsets, taps=taps)
        assert asdict(config)["offsets"] == offsets
