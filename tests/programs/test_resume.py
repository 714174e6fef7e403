"""A run that is stopped, killed or runs out of disk goes on as if nothing had happened, bit for bit."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_and_resume
import numpy as np
import pytest
from kill_and_resume import MODEL, ROOT, TEXT

import grassmann
import train_char
from checkpoint import load_checkpoint, save_checkpoint
from grassmann import Config, init_params

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")

STEPS = 500
OPTIONS = [*MODEL, "--dropout", "0.2", "--iters", str(STEPS), "--eval-every", "25"]
STOPPING = "\nstopping, to be resumed; once more ends it at once\n"


@pytest.fixture
def begin(start, text, tmp_path):
    """begin(*options) starts a run in tmp_path."""
    return lambda *options, out=tmp_path, **how: start(
        "train_char.py", *OPTIONS, "--data", text, "--out", out, *options, **how)


@pytest.fixture(scope="module")
def alone(start, ended, succeeded, text, tmp_path_factory):
    """alone(threads) -> the folder of a run that nobody disturbed."""
    folders = {}

    def run(threads):
        if threads not in folders:
            folders[threads] = out = tmp_path_factory.mktemp("alone") / "out"
            options = [*OPTIONS, "--threads", threads, "--data", text, "--out", out]
            succeeded(ended(start("train_char.py", *options)))
        return folders[threads]

    return run


@pytest.fixture
def copied(alone, tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(alone(1), tmp_path, dirs_exist_ok=True))


@pytest.fixture
def resume(call):
    return lambda out, *options: call("train_char.py", "--resume", "--out", out, *options)


def step_of(checkpoint):
    return load_checkpoint(checkpoint)[2]["step"]


# ---- stopped and resumed -------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_a_stopped_run_equals_one_that_was_not(
        begin, alone, tmp_path, threads, wait_for_step, ended, succeeded, differences, plain):
    """Parameters, optimiser, best model and every line of the log but for the seconds."""
    step, options = 0, ["--threads", threads]
    stops = [signal.SIGTERM, signal.SIGKILL, signal.SIGINT]
    while stops:
        process = begin(*options)
        wait_for_step(process, tmp_path, step + 26)
        process.send_signal(stops[0])
        process, reached = ended(process), step_of(tmp_path / "last.npz")
        assert step < reached < STEPS
        if stops[0] == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL and reached % 25 == 0
        else:
            assert (process.returncode, process.stderr) == (128 + stops[0], STOPPING)
            go_on = re.search(f"stopped at step {reached} and saved; go on with: (.*)", process.stdout)
        if stops[0] == signal.SIGKILL or reached % 5:  # once more, where log and validation fell on it
            stops.pop(0)
        step, options = reached, ["--threads", threads, "--resume"]
    command = f"{go_on[1]} --threads {threads}"
    subprocess.run(command, shell=True, check=True, env=plain, stdout=subprocess.DEVNULL)
    assert differences(tmp_path, alone(threads)) == []


@pytest.mark.parametrize("threads", [1, 2])
def test_stopped_in_every_validation(
        call, resume, succeeded, differences, tmp_path, monkeypatch, threads):
    """And the losses that are not logged yet are kept; the validation comes first on resume."""
    caught, calls, forward = [], [], grassmann.forward
    options = ["--dropout", 0.2, "--iters", 50, "--eval-every", 25, "--threads", threads, "--out"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    succeeded(call("train_char.py", *options, whole))

    def interrupted(*args):
        calls.append(args)
        if step == 25 or len(calls) > 2:  # (the one at step 25, in two chunks, is made up for first)
            caught.append(signal.SIGINT)
        return forward(*args)

    monkeypatch.setattr(train_char, "catch_signals", lambda: caught)
    for step in (25, 50):
        with monkeypatch.context() as patch:
            patch.setattr(grassmann, "forward", interrupted)
            again = ["--resume", "--threads", threads, "--out"] if step == 50 else options
            process = call("train_char.py", *again, out)
        assert process.returncode == 128 + signal.SIGINT and f"at step {step} " in process.stdout
        extra = load_checkpoint(out / "last.npz")[2]
        assert (extra["step"], len(extra["recent"])) == (step, {25: 5, 50: 10}[step])
        assert [row[0] for row in extra["log"]] == {25: [10, 20], 50: [10, 20, 25, 30, 40]}[step]
        caught.clear(), calls.clear()
    assert "at step 50\n" in succeeded(resume(out, "--threads", threads))
    assert differences(out, whole) == []


def test_ctrl_c_does_not_wait_for_a_long_validation(start, ended, log_lines, wait_for_step, tmp_path):
    """It would last for ten seconds."""
    (tmp_path / "text").write_text(TEXT * 1000)
    options = [*MODEL, "--data", tmp_path / "text", "--out", tmp_path, "--eval-every", "12"]
    process = start("train_char.py", *options, "--n-layer", 8, "--d-model", 64, "--rank", 8)
    wait_for_step(process, tmp_path, 10)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    process = ended(process)
    assert (process.returncode, process.stderr) == (130, STOPPING)
    assert len(log_lines(tmp_path)) == 2 and step_of(tmp_path / "last.npz") <= 12


def test_more_iterations_later(alone, copied, resume, succeeded, log_lines):
    """A finished run goes on at another pace, so fast that it gets worse, and with other threads.
    What it has logged so far stays, and so does its best model."""
    pace = ["--iters", STEPS + 30, "--eval-every", 15, "--lr", 5, "--threads", 2]
    succeeded(resume(copied, *pace))
    assert (copied / "best.npz").read_bytes() == (alone(1) / "best.npz").read_bytes()
    old, new = log_lines(alone(1)), log_lines(copied)
    assert new[: len(old)] == old and new[-1].startswith(f"{STEPS + 30},")
    settings = load_checkpoint(copied / "last.npz")[2]["settings"]
    assert (settings["iters"], settings["eval_every"], settings["lr"]) == (STEPS + 30, 15, 5)


@pytest.mark.parametrize("tail", [f"{STEPS + 10},undone,,0.001,9.99\n{STEPS + 20},1.", "5"])
def test_the_log_ends_where_the_checkpoint_is(copied, resume, succeeded, log_lines, tail):
    """Lines of steps that a kill has undone are not logged twice; half a line is dropped."""
    before = log_lines(copied)
    with (copied / "log.csv").open("a") as log:
        log.write(tail)
    succeeded(resume(copied, "--iters", STEPS + 20))
    *after, line, last_line = log_lines(copied)
    assert after == before and not (copied / "log.old.csv").exists()
    assert line.startswith(f"{STEPS + 10},") and "undone" not in line
    assert last_line.startswith(f"{STEPS + 20},")


@pytest.mark.parametrize("change", [
    lambda log: b"\xef\xbb\xbf" + log, lambda log: b"\xff\xfe" + log, lambda log: log[:99],
    lambda log: log.replace(b"\n", b"\n\n", 1), lambda log: log.replace(b"2.", b"two", 1),
    lambda log: b"", "older"])
def test_a_log_that_is_not_ours_is_kept(copied, resume, succeeded, log_lines, rewrite, change):
    """A spreadsheet puts a byte order mark in front; last.npz of an older run has no log."""
    before, log = log_lines(copied), (copied / "log.csv").read_bytes()
    if change == "older":
        rewrite(copied / "last.npz", lambda extra: extra.pop("log"))
        before = before[:1]
    else:
        (copied / "log.csv").write_bytes(log := change(log))
    assert "it is now log.old.csv" in succeeded(resume(copied, "--iters", STEPS + 10))
    assert (copied / "log.old.csv").read_bytes() == log
    assert log_lines(copied)[:-1] == before


def test_differences_are_found(alone, differences):
    """That the comparison of this file can fail: another number of threads, other last bits."""
    assert differences(alone(1), alone(1)) == []
    found = differences(alone(1), alone(2))
    assert {"log.csv", "last.npz: param", "last.npz: adam_v", "last.npz: log"} <= {*found}


def test_killed_again_and_again(capsys):
    assert kill_and_resume.main(["--kills", "3"]) == 0, capsys.readouterr().out
    assert "3 kills" in capsys.readouterr().out


# ---- signals -------------------------------------------------------------------------------------


def test_a_second_ctrl_c_leaves_at_once(begin, ended, tmp_path):
    """The first one waits for the end of the step, and this step takes long."""
    process = begin("--context", 128, "--batch-size", 1024, "--d-model", 64, "--n-layer", 8, "--threads", 1)
    while process.poll() is None and not (tmp_path / "log.csv").exists():  # after signals are caught
        time.sleep(0.001)
    before = (tmp_path / "last.npz").read_bytes()
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() + process.stderr.readline() == STOPPING  # at once
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process = ended(process)
    assert (process.returncode, process.stderr) == (-signal.SIGINT, "")
    assert "stopped at step" not in process.stdout
    assert (tmp_path / "last.npz").read_bytes() == before


def test_a_closed_terminal_loses_nothing(begin, wait_for_step, tmp_path):
    """Nothing can be written any more; SIGHUP comes twice, from the terminal and from the shell."""
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    ends = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    process = begin("--eval-every", 1000, "--batch-size", 4000, "--threads", 1, **ends)
    os.close(theirs)
    wait_for_step(process, tmp_path, 10)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.02)  # two at once would count as one
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert 10 <= step_of(tmp_path / "last.npz") < STEPS


def test_a_signal_after_the_readers_have_left(begin, wait_for_step, tmp_path):
    process = begin("--eval-every", 1000, "--batch-size", 400, "--threads", 1)
    process.stdout.close(), process.stderr.close()
    wait_for_step(process, tmp_path, 10)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert 10 <= step_of(tmp_path / "last.npz") < STEPS


@pytest.mark.parametrize("ignored", [signal.SIGHUP, signal.SIGINT])
def test_an_ignored_signal_is_ignored(begin, wait_for_step, ended, succeeded, tmp_path, ignored):
    """As nohup has it, or a script for what it starts in the background."""
    process = begin(preexec_fn=lambda: signal.signal(ignored, signal.SIG_IGN))
    wait_for_step(process, tmp_path, 20)
    process.send_signal(ignored)
    succeeded(ended(process))
    assert step_of(tmp_path / "last.npz") == STEPS


def test_a_signal_before_the_first_loss(call, tmp_path, monkeypatch, succeeded, resume):
    """Nothing is logged yet, nothing to draw."""
    monkeypatch.setattr(train_char, "catch_signals", lambda: [signal.SIGTERM])
    process = call("train_char.py", "--iters", 5, "--out", tmp_path)
    assert (process.returncode, process.stderr) == (128 + signal.SIGTERM, "")
    monkeypatch.setattr(train_char, "catch_signals", list)
    assert "at step 5\n" in succeeded(resume(tmp_path))


def test_a_signal_in_the_last_step_is_too_late(call, succeeded, tmp_path, monkeypatch):
    """The run is complete but for its validation, which is not stopped by it; it reports as ever."""
    caught, validate = [], train_char.validate

    def signalled(*args):
        loss = validate(*args)
        caught.append(signal.SIGINT)
        return loss

    monkeypatch.setattr(train_char, "validate", signalled)
    monkeypatch.setattr(train_char, "catch_signals", lambda: caught)
    printed = succeeded(call("train_char.py", "--iters", 1, "--out", tmp_path))
    assert "at step 1\n" in printed and caught


def test_two_runs_in_one_folder(
        begin, alone, ended, refused, succeeded, wait_for_step, differences, tmp_path):
    """The second is refused, new or resumed; the first goes on."""
    pytest.importorskip("fcntl")
    process = begin("--threads", 1)
    wait_for_step(process, tmp_path, 30)
    for how in ("--seed=1", "--resume"):
        assert "another run" in refused(ended(begin(how)))
    assert process.poll() is None, "too short a run for this test"
    succeeded(ended(process))
    assert differences(tmp_path, alone(1)) == []


# ---- what --resume refuses -----------------------------------------------------------------------


@pytest.mark.parametrize("flags", [
    "--context 7", "--n-layer 3", "--d-model 16", "--rank 4", "--offsets 1;2", "--block paper",
    "--no-taps", "--normalize", "--positions", "--mixer attention", "--n-head 2", "--dropout 0.3",
    "--seed 1", "--batch-size 5", "--weight-decay 0.3", "--grad-clip 0", "--d-ff 7", "--paper"])
def test_resume_refuses_another_model_by_name(alone, resume, refused, flags):
    name = {"--no-taps": "--taps", "--paper": "--block"}.get(flags, flags.split()[0])
    process = resume(alone(1), "--iters", 999, *flags.split())
    assert f"--resume cannot change {name}:" in refused(process)


def test_resume_refuses_what_it_cannot_do(alone, resume, refused, tmp_path):
    out, before = alone(1), {file.name: file.read_bytes() for file in alone(1).iterdir()}
    assert "nothing to resume" in refused(resume(tmp_path / "nowhere"))
    for iters in ([], ["--iters", STEPS], ["--iters", STEPS - 1]):
        sentence = refused(resume(out, *iters))
        assert f"is at step {STEPS}" in sentence and "--iters" in sentence
    message = "--min-lr (1.0) must not exceed --lr (0.003)"
    assert message in refused(resume(out, "--iters", 999, "--min-lr", 1))
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_the_text_is_known_by_its_contents(call, resume, succeeded, refused, tmp_path):
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text(TEXT)
    succeeded(call("train_char.py", "--iters", 2, "--data", text, "--out", out))
    moved = text.rename(tmp_path / "moved")
    assert f"cannot read {text}" in refused(resume(out, "--iters", 3))
    text.write_text(TEXT.replace("7", "8", 1))
    sentence = f"--resume cannot change the text, and {text} is not what {out / 'last.npz'} was"
    assert sentence in refused(resume(out, "--iters", 3))
    succeeded(resume(out, "--iters", 3, "--data", moved))
    text.unlink()
    succeeded(resume(out, "--iters", 4))  # it is known where the text is now


def test_resume_takes_the_same_options_again(copied, text, resume, succeeded):
    """The whole command line may be repeated, with --resume and more --iters."""
    succeeded(resume(copied, *OPTIONS, "--data", text, "--iters", STEPS + 5))
    assert step_of(copied / "last.npz") == STEPS + 5


def test_the_best_model_is_looked_at_before_a_run_goes_on(copied, resume, succeeded, refused):
    """A damaged one is found at once; one that is gone is written at the next validation."""
    good = (copied / "best.npz").read_bytes()
    (copied / "best.npz").write_bytes(good[:-99])
    assert str(copied / "best.npz") in refused(resume(copied, "--iters", STEPS + 5))
    (copied / "best.npz").unlink()
    printed = succeeded(resume(copied, "--iters", STEPS + 20, "--lr", 5))
    assert step_of(copied / "best.npz") == STEPS + 20 and f"at step {STEPS + 20}\n" in printed


# ---- files that are not what they should be ------------------------------------------------------


@pytest.fixture
def rewrite():

    def rewrite(path, change):
        """Change the meta document of a checkpoint: change(extra, meta) or change(extra)."""
        with np.load(path) as file:
            arrays = dict(file)
        meta = json.loads(arrays["meta"].tobytes())
        change(meta["extra"])
        arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        np.savez(path, **arrays)

    return rewrite


NONSENSE = ["many", "", {}, {"a": 1}, None, True, 10**400, -1, 1.5, float("inf"), float("nan"), [[]]]
ROW = [10, 3.0, None, 0.001, 1.0]


@pytest.mark.parametrize("key, values", [
    ("step", NONSENSE), ("seconds", [*NONSENSE[:7], *NONSENSE[9:]]), ("log", [*NONSENSE, [ROW[:4]], [ROW * 2]]),
    ("recent", [*NONSENSE, [None], ["1"], [10**400], [float("nan")], [True]]),
    ("best", [*NONSENSE[:4], *NONSENSE[5:], [], [1], [1, 2, 3], [-1, 2], [1.0, 2], [1, "x"], [1, None]]),
    *((f"log {k}", [*NONSENSE[:4], *([None] if k != 2 else []), True, 10**400, float("nan")]) for k in range(5)),
    *((name, [*NONSENSE[:4], None, float("nan"), [[]]]) for name in ("iters", "lr", "batch_size", "eval_every")),
    ("eval_every", [0, -5, 1.5]), ("data", [5, [5], {"a": 1}["a"], True, [None]]), ("min_lr", ["x", [1]]),
    ("settings", NONSENSE), ("text_sha256", [None, 5]),
], ids=lambda value: value if isinstance(value, str) else "")
def test_progress_that_makes_no_sense(alone, resume, refused, rewrite, tmp_path, key, values):
    """It is refused with one sentence that names the file."""
    last = tmp_path / "last.npz"
    for value in values:
        shutil.copy(alone(1) / "last.npz", last)

        def change(extra, value=value):
            if key.startswith("log "):
                extra["log"][3][int(key[4:])] = value
            else:
                (extra["settings"] if key in train_char.DEFAULTS else extra)[key] = value

        rewrite(last, change)
        sentence = refused(resume(tmp_path, "--iters", 999) if key != "iters" else resume(tmp_path))
        assert str(last) in sentence, (value, sentence)


def damaged(content):
    return lambda path: path.write_bytes(content(path.read_bytes()))


def not_from_training(path):
    config = Config(5, context=4, n_layer=1, d_model=4, rank=2)
    save_checkpoint(path, init_params(config), config)


BAD_CHECKPOINTS = {
    "missing": (lambda path: path.unlink(), "does not exist"),
    "empty": (damaged(lambda old: b""), "not a usable checkpoint"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
    "cut in half": (damaged(lambda old: old[: len(old) // 2]), "not a usable checkpoint"),
    "another version": (damaged(lambda old: old.replace(b'"format": 1', b'"format": 9')), "usable"),
    "pickle": (damaged(lambda old: b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x08builtins\x8c\x04eval\x93."), "usable"),
    "not from training": (not_from_training, ""),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_bad_checkpoints(alone, call, resume, refused, tmp_path, kind):
    make, message = BAD_CHECKPOINTS[kind]
    last = Path(shutil.copy(alone(1) / "last.npz", tmp_path))
    make(last)
    for process in (call("sample.py", last), resume(tmp_path, "--iters", 999)):
        sentence = refused(process)
        assert message in sentence and str(last) in sentence and process.stdout == ""


# ---- trouble with the disk -----------------------------------------------------------------------


@pytest.fixture
def in_trouble(ended, refused):

    def in_trouble(process):
        """The sentence with which a run stops, naming where."""
        sentence = refused(ended(process))
        words = [str(word) for word in process.args]
        assert words[words.index("--out") + 1] in sentence
        return sentence

    return in_trouble


def test_folder_removed_during_the_run(begin, wait_for_step, in_trouble, tmp_path):
    """Moved away, so that its last checkpoint can be looked at; then also before it is stopped."""
    for options, step in ([], 40), (["--eval-every", 1000], 20):
        out, moved = tmp_path / f"out{step}", tmp_path / f"moved{step}"
        process = begin(*options, out=out)
        wait_for_step(process, out, step)
        out.rename(moved)
        if options:
            process.send_signal(signal.SIGTERM)
            process.stderr.readline(), process.stderr.readline()
        assert "No such file or directory" in in_trouble(process)
        assert not out.exists() and step_of(moved / "last.npz") < STEPS


def test_folder_replaced_by_a_file_during_the_run(
        begin, wait_for_step, in_trouble, resume, alone, differences, succeeded, tmp_path):
    out = tmp_path / "out"
    process = begin("--threads", 1, out=out)
    wait_for_step(process, out, 40)
    out.rename(tmp_path / "moved")
    out.write_text("mine")
    assert "Not a directory" in in_trouble(process) and out.read_text() == "mine"
    out.unlink()
    (tmp_path / "moved").rename(out)  # the trouble is over
    succeeded(resume(out, "--threads", 1))
    assert differences(out, alone(1)) == []


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_folder_made_read_only_during_the_run(begin, wait_for_step, in_trouble, tmp_path):
    process = begin()
    wait_for_step(process, tmp_path, 40)
    tmp_path.chmod(0o555)
    assert "Permission denied" in in_trouble(process)
    tmp_path.chmod(0o755)
    assert 25 <= step_of(tmp_path / "last.npz") < STEPS


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(n_bytes) mounts a file system of that size and returns its folder."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size):
        options = f"size={size}" + (",remount" if os.path.ismount(disk) else "")
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("may not mount a small file system here")
        return disk

    if sys.platform != "linux" or not shutil.which("mount"):
        pytest.skip("has no tmpfs to mount")
    yield mount
    if os.path.ismount(disk):
        subprocess.run(["umount", disk], check=True)


def test_full_disk(begin, alone, small_disk, in_trouble, resume, succeeded, differences):
    """First nothing fits; then the first checkpoint and the best model do, but not the next."""
    best, last = ((alone(1) / name).stat().st_size for name in ("best.npz", "last.npz"))
    disk = small_disk(last // 2)
    assert "No space left on device" in in_trouble(begin(out=disk))
    assert list(disk.iterdir()) == []
    small_disk(best + last + last // 2)
    assert "No space left on device" in in_trouble(begin("--threads", 1, out=disk))
    assert sorted(file.name for file in disk.iterdir()) == ["best.npz", "last.npz", "log.csv"]
    assert step_of(disk / "last.npz") == 0
    small_disk(10 * (best + last))  # now there is room
    succeeded(resume(disk, "--threads", 1))
    assert differences(disk, alone(1)) == []


def test_resume_on_a_full_disk(begin, alone, small_disk, in_trouble, log_lines, contents):
    """It stops, and loses nothing of what was there before."""
    disk = small_disk(10**7)
    shutil.copytree(alone(1), disk, dirs_exist_ok=True)
    with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
    process = begin("--resume", "--threads", 1, "--iters", STEPS + 20, out=disk)
    assert "No space left on device" in in_trouble(process)
    logged = log_lines(alone(1))
    assert log_lines(disk)[: len(logged)] == logged
    assert contents(disk / "last.npz") == contents(alone(1) / "last.npz")


def test_a_log_that_cannot_be_written_keeps_its_lines(
        program, copied, alone, refused, log_lines, contents):
    """The system lets the program write 1000 bytes into a file, less than the log has."""
    resource = pytest.importorskip("resource")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # noqa: E731
    options = ["--resume", "--out", copied, "--iters", STEPS + 20]
    refused(program("train_char.py", *options, preexec_fn=limit))
    logged = log_lines(alone(1))
    assert log_lines(copied)[: len(logged)] == logged
    assert contents(copied / "last.npz") == contents(alone(1) / "last.npz")
