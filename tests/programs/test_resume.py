"""A run that is stopped, killed or out of disk goes on as if nothing had happened, bit for bit."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import kill_and_resume
import numpy as np
import pytest
from kill_and_resume import MODEL, TEXT

import grassmann
import train_char
from checkpoint import load_checkpoint

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
STEPS, MORE = 500, ["--iters", 520]
OPTIONS = [*MODEL, "--dropout", "0.2", "--iters", str(STEPS), "--eval-every", "25"]
STOPPING = "\nstopping, to be resumed; once more ends it at once\n"

@pytest.fixture(scope="module")
def begin(start, text):
    """begin(out, *options) starts a run."""
    return lambda out, *options, **how: start(
        "train_char.py", *OPTIONS, "--data", text, "--out", out, *options, **how)

@pytest.fixture(scope="module")
def alone(begin, ended, succeeded, tmp_path_factory):
    """alone(threads) -> the folder of a run that nobody disturbed."""
    folders = {}

    def run(threads):
        if threads not in folders:
            folders[threads] = tmp_path_factory.mktemp("alone") / "out"
            succeeded(ended(begin(folders[threads], "--threads", threads)))
        return folders[threads]

    return run

@pytest.fixture
def copied(alone, tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(alone(1), tmp_path, dirs_exist_ok=True))

@pytest.fixture
def resume(call):
    return lambda out, *options: call("train_char.py", "--resume", "--out", out, *options)

def step_of(folder, name="last.npz"):
    return load_checkpoint(folder / name)[2]["step"]

@pytest.mark.parametrize("threads", [1, 2])
def test_a_stopped_run_equals_one_that_was_not(
        begin, alone, tmp_path, threads, wait_for_step, ended, differences, plain):
    """Parameters, optimiser, best model and every line of the log but for the seconds."""
    step, options = 0, ["--threads", threads]
    stops = [signal.SIGTERM, signal.SIGKILL, signal.SIGINT]
    while stops:
        process = begin(tmp_path, *options)
        wait_for_step(process, tmp_path, step + 26)
        process.send_signal(stops[0])
        process, reached = ended(process), step_of(tmp_path)
        assert step < reached < STEPS
        if stops[0] == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL and reached % 25 == 0
        else:
            assert (process.returncode, process.stderr) == (128 + stops[0], STOPPING)
            said = f"stopped at step {reached} and saved; go on with: (.*)"
            command = re.search(said, process.stdout)[1]
        if stops[0] == signal.SIGKILL or reached % 5:  # once more, where log and validation meet
            stops.pop(0)
        step, options = reached, ["--threads", threads, "--resume"]
    again = {"shell": True, "check": True, "env": plain, "stdout": subprocess.DEVNULL}
    subprocess.run(command, **again)
    assert differences(tmp_path, alone(threads)) == []

@pytest.mark.parametrize("threads", [1, 2])
def test_stopped_in_every_validation(
        call, resume, succeeded, differences, tmp_path, monkeypatch, threads):
    """Losses that are not logged yet are kept, and the validation comes first on resume."""
    caught, calls, forward = [], [], grassmann.forward
    options = ["--dropout", 0.2, "--iters", 50, "--eval-every", 25, "--threads", threads, "--out"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    succeeded(call("train_char.py", *options, whole))

    def interrupted(*args):
        calls.append(args)
        if step == 25 or len(calls) > 2:  # (the one at step 25, of two chunks, is made up for)
            caught.append(signal.SIGINT)
        return forward(*args)

    monkeypatch.setattr(train_char, "catch_signals", lambda: caught)
    for step, recent, logged in ((25, 5, [10, 20]), (50, 10, [10, 20, 25, 30, 40])):
        with monkeypatch.context() as patch:
            patch.setattr(grassmann, "forward", interrupted)
            again = ["--resume", "--threads", threads, "--out"] if step == 50 else options
            process = call("train_char.py", *again, out)
        assert process.returncode == 128 + signal.SIGINT and f"at step {step} " in process.stdout
        extra = load_checkpoint(out / "last.npz")[2]
        assert (extra["step"], len(extra["recent"])) == (step, recent)
        assert [row[0] for row in extra["log"]] == logged
        caught.clear(), calls.clear()
    assert "at step 50\n" in succeeded(resume(out, "--threads", threads))
    assert differences(out, whole) == []

def test_more_iterations_later(alone, copied, resume, succeeded, log_lines):
    """A finished run goes on at another pace, so fast that it gets worse, and with other threads.
    What it has logged so far stays, and so does its best model. All options may be repeated."""
    pace = ["--iters", STEPS + 30, "--eval-every", 15, "--lr", 5, "--threads", 2]
    succeeded(resume(copied, *OPTIONS, *pace))
    assert (copied / "best.npz").read_bytes() == (alone(1) / "best.npz").read_bytes()
    old, new = log_lines(alone(1)), log_lines(copied)
    assert new[: len(old)] == old and new[-1].startswith(f"{STEPS + 30},")
    settings = load_checkpoint(copied / "last.npz")[2]["settings"]
    assert (settings["iters"], settings["eval_every"], settings["lr"]) == (STEPS + 30, 15, 5)

MARK = b"\xef\xbb\xbf"

@pytest.mark.parametrize("change, ours", [
    (lambda log: log + b"510,undone,,0.001,9.99\n520,1.", True), (lambda log: log + b"5", True),
    (lambda log: MARK + log, False), (lambda log: log.replace(b"\n", b"\n\n", 1), False),
    (lambda log: log.replace(b"2.", b"two", 1), False), (lambda log: log[:99], False),
    (lambda log: b"", False), (None, False)])
def test_the_log_is_written_from_the_checkpoint(
        copied, resume, succeeded, log_lines, change, ours):
    """Lines of steps that a kill has undone vanish, and half a line. A log that was changed (as by
    a spreadsheet) or is of an older run, whose last.npz has none, is kept."""
    before, log, old = log_lines(copied), (copied / "log.csv").read_bytes(), copied / "log-old-1.csv"
    if change is None:
        rewrite(copied / "last.npz", lambda extra: extra.pop("log"))
        before = before[:1]
    else:
        (copied / "log.csv").write_bytes(log := change(log))
    printed = succeeded(resume(copied, *MORE))
    *after, line, last_line = log_lines(copied)
    assert after == before and line.startswith("510,") and last_line.startswith("520,")
    assert ours != ("it is now log-old-1.csv" in printed) == old.exists() and "undone" not in line
    assert ours or old.read_bytes() == log

def test_a_second_foreign_log_does_not_take_the_place_of_the_first(copied, resume, succeeded):
    for k, mine in ((1, b"mine"), (2, b"mine, too")):
        (copied / "log.csv").write_bytes(mine)
        succeeded(resume(copied, "--iters", STEPS + k))
    assert [(copied / f"log-old-{k}.csv").read_bytes() for k in (1, 2)] == [b"mine", b"mine, too"]

def test_differences_are_found(alone, differences):
    """That the comparison of this file can fail: another number of threads, other last bits."""
    assert differences(alone(1), alone(1)) == []
    found = {*differences(alone(1), alone(2))}
    assert {"log.csv", "last.npz: param", "last.npz: adam_v", "last.npz: log"} <= found

def test_killed_again_and_again(capsys):
    kill_and_resume.main(["--kills", "3"])
    assert "3 kills" in capsys.readouterr().out

def test_a_second_ctrl_c_leaves_at_once(begin, ended, tmp_path):
    """The first one is acknowledged at once and waits for the end of the step, which takes long."""
    long = ["--context", 128, "--batch-size", 1024, "--d-model", 64, "--n-layer", 8, "--threads", 1]
    process = begin(tmp_path, *long)
    while process.poll() is None and not (tmp_path / "log.csv").exists():  # signals are caught then
        time.sleep(0.001)
    before = (tmp_path / "last.npz").read_bytes()
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() + process.stderr.readline() == STOPPING
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process = ended(process)
    assert (process.returncode, process.stderr) == (-signal.SIGINT, "")
    assert "stopped" not in process.stdout and (tmp_path / "last.npz").read_bytes() == before

@pytest.mark.parametrize("terminal", [True, False])
def test_a_closed_terminal_loses_nothing(begin, wait_for_step, tmp_path, terminal):
    """Nothing can be written any more, nor into a pipe that nobody reads. SIGHUP comes twice, from
    the terminal and from the shell."""
    ours, theirs = pytest.importorskip("pty").openpty()
    ends = dict.fromkeys(("stdin", "stdout", "stderr"), theirs) if terminal else {}
    process = begin(tmp_path, "--eval-every", 1000, "--batch-size", 2000, "--threads", 1, **ends)
    os.close(theirs)
    for pipe in [] if terminal else [process.stdout, process.stderr]:
        pipe.close()
    wait_for_step(process, tmp_path, 10)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.02)  # two at once would count as one
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP and 10 <= step_of(tmp_path) < STEPS

@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT"])
def test_an_ignored_signal_is_ignored(begin, wait_for_step, ended, succeeded, tmp_path, name):
    """As nohup has it, or a script for what it starts in the background."""
    ignored = getattr(signal, name)
    process = begin(tmp_path, preexec_fn=lambda: signal.signal(ignored, signal.SIG_IGN))
    wait_for_step(process, tmp_path, 20)
    process.send_signal(ignored)
    succeeded(ended(process))
    assert step_of(tmp_path) == STEPS

def test_signals_at_the_start_and_at_the_end(call, succeeded, resume, tmp_path, monkeypatch):
    """Before the first loss nothing is logged yet. After the last validation it is too late: the
    run is complete and reports as ever."""
    caught, real = [signal.SIGTERM], train_char.validate
    monkeypatch.setattr(train_char, "catch_signals", lambda: caught)
    process = call("train_char.py", "--iters", 5, "--out", tmp_path)
    assert (process.returncode, process.stderr, step_of(tmp_path)) == (128 + signal.SIGTERM, "", 0)
    caught.clear()
    monkeypatch.setattr(train_char, "validate", lambda *args: (real(*args), caught.append(2))[0])
    assert "at step 5\n" in succeeded(resume(tmp_path)) and caught

def test_two_runs_in_one_folder(
        begin, alone, ended, refused, succeeded, wait_for_step, differences, tmp_path):
    """The second is refused, new or resumed; the first goes on."""
    pytest.importorskip("fcntl")
    process = begin(tmp_path, "--threads", 1)
    wait_for_step(process, tmp_path, 30)
    for how in ("--seed=1", "--resume"):
        assert "another run" in refused(ended(begin(tmp_path, how)))
    assert process.poll() is None, "too short a run for this test"
    succeeded(ended(process))
    assert differences(tmp_path, alone(1)) == []

@pytest.mark.parametrize("flags", [
    "--context 7", "--n-layer 3", "--d-model 16", "--rank 4", "--offsets 1;2", "--block paper",
    "--no-taps", "--normalize", "--positions", "--mixer attention", "--n-head 2", "--dropout 0.3",
    "--memory", "--seed 1", "--batch-size 5", "--weight-decay 0.3", "--grad-clip 0", "--d-ff 7", "--paper"])
def test_resume_refuses_another_model_by_name(alone, resume, refused, flags):
    name = {"--no-taps": "--taps", "--paper": "--block"}.get(flags, flags.split()[0])
    assert f"--resume cannot change {name}:" in refused(resume(alone(1), *MORE, *flags.split()))

def test_attention_has_no_offsets_to_change(call, resume, succeeded, tmp_path):
    how = "--paper", "--mixer", "attention", "--n-head", 2
    succeeded(call("train_char.py", "--iters", 2, *how, "--out", tmp_path))
    succeeded(resume(tmp_path, "--iters", 3, *how))

def test_resume_refuses_what_it_cannot_do(alone, resume, refused, tmp_path):
    out, before = alone(1), {file.name: file.read_bytes() for file in alone(1).iterdir()}
    assert "nothing to resume" in refused(resume(tmp_path / "nowhere"))
    for iters in ([], ["--iters", STEPS], ["--iters", STEPS - 1]):
        assert f"is at step {STEPS}; to go on, give --iters" in refused(resume(out, *iters))
    message = "--min-lr (1.0) must not exceed --lr (0.003)"
    assert message in refused(resume(out, *MORE, "--min-lr", 1))
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

def test_the_best_model_is_looked_at_before_a_run_goes_on(copied, resume, succeeded, refused):
    """A damaged one is found at once; one that is gone is written at the next validation."""
    good = (copied / "best.npz").read_bytes()
    (copied / "best.npz").write_bytes(good[:-99])
    assert str(copied / "best.npz") in refused(resume(copied, *MORE))
    (copied / "best.npz").unlink()
    assert f"at step {STEPS + 20}\n" in succeeded(resume(copied, *MORE, "--lr", 5))
    assert step_of(copied, "best.npz") == STEPS + 20

def rewrite(path, change, part="extra"):
    """Change what a checkpoint holds beside arrays: change(extra), or of another part."""
    with np.load(path) as file:
        arrays = dict(file)
    meta = json.loads(arrays["meta"].tobytes())
    change(meta[part])
    np.savez(path, **arrays | {"meta": np.frombuffer(json.dumps(meta).encode(), np.uint8)})

def test_a_run_from_before_there_was_a_memory(copied, resume, succeeded, differences, tmp_path_factory):
    """Its files lack the field: they load, and it goes on as one that has it."""
    same = Path(shutil.copytree(copied, tmp_path_factory.mktemp("same"), dirs_exist_ok=True))
    for name in ("last.npz", "best.npz"):
        rewrite(copied / name, lambda config: config.pop("memory"), "config")
        assert not load_checkpoint(copied / name)[1].memory
    for folder in (same, copied):
        succeeded(resume(folder, *MORE))
    assert differences(copied, same) == []

NAN, INF, BAD = float("nan"), float("inf"), ["many", "", {}, {"a": 1}, True, 10**400, [[]]]
ROW = [10, 3.0, None, 0.001, 1.0]

@pytest.mark.parametrize("key, values", [
    ("step", [*BAD, None, -1, 1.5]), ("seconds", [*BAD, None, INF, NAN]), ("text_sha256", [None]),
    ("recent", [*BAD, None, 5, [None], ["1"], [10**400], [NAN], [True]]), ("log 4", [*BAD, None]),
    ("best", [*BAD, 5, [], [1], [1, 2, 3], [-1, 2], [1.0, 2], [1, "x"], [1, None], [1, INF]]),
    ("log", [*BAD, None, 5, [ROW[:4]], [ROW * 2], ["10,3,"]]), ("log 0", [*BAD, None, -10, 1.5]),
    ("log 1", [*BAD, None, NAN]), ("log 2", [*BAD, INF]), ("log 3", [*BAD, None]),
    ("settings", [*BAD, None, 5]), ("data", [5, [5], True, [None]]), ("min_lr", ["x", [1], NAN]),
    ("iters", [*BAD[:4], None, 1.5]), ("lr", [*BAD[:4], None, NAN, -1]), ("seed", [*BAD[:4], -1]),
    ("batch_size", [*BAD[:4], None]), ("eval_every", [*BAD[:4], None, 0, -5, 1.5])])
def test_progress_that_makes_no_sense(alone, resume, refused, tmp_path, key, values):
    """It is refused with one sentence that names the file."""
    for value in values:
        last = Path(shutil.copy(alone(1) / "last.npz", tmp_path))

        def change(extra, value=value):
            place = extra["settings"] if key in train_char.DEFAULTS else extra
            if key.startswith("log "):
                place["log"][3][int(key[4:])] = value
            else:
                place[key] = value

        rewrite(last, change)
        assert f"{last} cannot be resumed" in refused(resume(tmp_path, *([] if key == "iters" else MORE)))

@pytest.mark.parametrize("damage, message", [
    (False, "does not exist"), (lambda old: b"", "not a usable checkpoint"),
    (lambda old: old[: len(old) // 2], "not a usable checkpoint"),
    (lambda old: old.replace(b'"format": 1', b'"format": 9'), "not a usable checkpoint"),
    (lambda old: b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "not a usable checkpoint")])
def test_damaged_checkpoints(alone, call, resume, refused, tmp_path, damage, message):
    last = tmp_path / "last.npz"
    if damage:
        last.write_bytes(damage((alone(1) / "last.npz").read_bytes()))
    for process in (call("sample.py", last), resume(tmp_path, *MORE)):
        sentence = refused(process)
        assert message in sentence and str(last) in sentence and process.stdout == ""

@pytest.mark.parametrize("mine, message", [(None, "No such file"), ("mine", "Not a directory")])
def test_a_folder_that_is_moved_away(begin, wait_for_step, ended, refused, resume, succeeded,
                                     differences, alone, tmp_path, mine, message):
    """And a file may be put in its place. Once the folder is back, the run goes on."""
    out, moved = tmp_path / "out", tmp_path / "moved"
    process = begin(out, "--threads", 1)
    wait_for_step(process, out, 40)
    out.rename(moved)
    if mine:
        out.write_text(mine)
    sentence = refused(ended(process))
    assert str(out) in sentence and message in sentence and out.exists() == bool(mine)
    out.unlink(missing_ok=True)
    moved.rename(out)
    succeeded(resume(out, "--threads", 1))
    assert differences(out, alone(1)) == []

@pytest.mark.skipif(not shutil.which("mount"), reason="mounts a small file system")
def test_full_disk(begin, alone, ended, refused, resume, succeeded, differences, tmp_path):
    """First nothing fits; then the first checkpoint and the best model do, but not the next."""
    best, last = ((alone(1) / name).stat().st_size for name in ("best.npz", "last.npz"))
    mount = ["mount", "-t", "tmpfs", "tmpfs", tmp_path, "-o"]
    if subprocess.run([*mount, f"size={last // 2}"], capture_output=True).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        for size, left in ((best + 1.5 * last, ""), (10 * last, "best.npz last.npz log.csv")):
            sentence = refused(ended(begin(tmp_path, "--threads", 1)))
            assert str(tmp_path) in sentence and "No space left on device" in sentence
            assert " ".join(sorted(file.name for file in tmp_path.iterdir())) == left
            subprocess.run([*mount, f"remount,size={int(size)}"], check=True)
        assert step_of(tmp_path) == 0
        succeeded(resume(tmp_path, "--threads", 1))  # now there is room
        assert differences(tmp_path, alone(1)) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)

def test_a_log_that_cannot_be_written(program, alone, copied, refused, log_lines, contents):
    """The system allows files of 1000 bytes, less than the log has; what was there is not lost."""
    resource = pytest.importorskip("resource")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # noqa: E731
    refused(program("train_char.py", "--resume", "--out", copied, *MORE, preexec_fn=limit))
    assert log_lines(copied)[: len(log_lines(alone(1)))] == log_lines(alone(1))
    assert contents(copied / "last.npz") == contents(alone(1) / "last.npz")
