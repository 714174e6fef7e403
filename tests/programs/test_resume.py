"""A run that is stopped, killed or out of disk goes on as if nothing had happened, bit for bit."""

import os
import re
import shutil
import signal
import subprocess
import time

import kill_and_resume
import numpy as np
import pytest
from kill_and_resume import MODEL, TEXT

import grassmann
from charlm import processes
from charlm.checkpoint import load_checkpoint

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
STEPS, MORE = 300, ["--iters", 320]
OPTIONS = [*MODEL, "--dropout", "0.2", "--iters", str(STEPS), "--eval-every", "25"]
STOPPING = "\nSaving. Ctrl-C again quits at once.\n"


@pytest.fixture(scope="module")
def begin(start, text):
    """begin(out, *options) starts a run on one thread."""
    given = [*OPTIONS, "--threads", 1, "--data", text, "--out"]
    return lambda out, *options, **how: start("train_char.py", *given, out, *options, **how)


@pytest.fixture(scope="module")
def alone(begin, ended, succeeded, tmp_path_factory):
    """The folder of a run that was not interrupted. Tests only read it."""
    out = tmp_path_factory.mktemp("alone") / "out"
    succeeded(ended(begin(out)))
    return out


@pytest.fixture
def copied(alone, tmp_path):
    return shutil.copytree(alone, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def resume(call):
    return lambda out, *options: call(
        "train_char.py", "--resume", "--threads", 1, "--out", out, *options
    )


def step_of(folder, name="last.npz"):
    return load_checkpoint(folder / name)[2]["step"]


def test_a_stopped_run_equals_one_that_was_not(begin, alone, tmp_path, wait_for_step, ended, plain):
    """Parameters, optimiser, best model and every line of the log, except the seconds.

    Ctrl-C may end who reads, too.
    """
    step, options = 0, []
    for stop, read in (
        (signal.SIGTERM, True),
        (signal.SIGHUP, True),
        (signal.SIGINT, True),
        (signal.SIGINT, False),
    ):
        process = begin(tmp_path, *options)
        wait_for_step(process, tmp_path, step + 25)
        None if read else process.stderr.close()  # as in 2>&1 | tee log
        process.send_signal(stop)
        process, reached, options = ended(process), step_of(tmp_path), ["--resume"]
        assert step < reached < STEPS, "too short a run for this test"
        assert (process.returncode, process.stderr) == (
            128 + stop,
            STOPPING * (stop == signal.SIGINT and read),
        )
        command = re.search(
            f"stopped at step {reached} and saved; go on with: (.*)", process.stdout
        )[1]
        step = reached
    subprocess.run(
        f"{command} --threads 1", shell=True, check=True, env=plain, stdout=subprocess.DEVNULL
    )
    assert kill_and_resume.differences(tmp_path, alone) == []


@pytest.mark.parametrize("threads", [1, 2])
def test_stopped_in_every_validation(call, resume, succeeded, tmp_path, monkeypatch, threads):
    """Losses that are not logged yet are kept, and the validation comes first on resume."""
    calls, forward = [], grassmann.forward
    options = ["--dropout", 0.2, "--iters", 50, "--eval-every", 25, "--threads", threads, "--out"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    succeeded(call("train_char.py", *options, whole))

    def interrupted(*args):
        calls.append(args)
        if step == 25 or len(calls) > 2:  # (two calls make up for the validation at step 25)
            processes.stops.append(signal.SIGINT)
        return forward(*args)

    for step, recent, logged in ((25, 5, [10, 20]), (50, 10, [10, 20, 25, 30, 40])):
        with monkeypatch.context() as patch:
            patch.setattr(grassmann, "forward", interrupted)
            process = (
                resume(out, "--threads", threads)
                if step == 50
                else call("train_char.py", *options, out)
            )
        assert process.returncode == 128 + signal.SIGINT and f"at step {step} " in process.stdout
        extra = load_checkpoint(out / "last.npz")[2]
        assert (extra["step"], len(extra["recent"]), [row[0] for row in extra["log"]]) == (
            step,
            recent,
            logged,
        )
        assert (
            len(calls) == (1 if step == 25 else 3) or threads == 2
        )  # the second chunk is not begun
        calls.clear()
    assert "at step 50\n" in succeeded(resume(out, "--threads", threads))
    assert kill_and_resume.differences(out, whole) == []


def test_a_closed_terminal_loses_nothing(begin, wait_for_step, ended, refused, tmp_path):
    """Output is impossible then. SIGHUP comes twice, from the terminal and from the shell.

    Until then a second run in the folder is refused. Ctrl-C was ignored when the run began, as in
    the background, so it stays ignored.
    """
    ours, theirs = pytest.importorskip("pty").openpty()
    ends = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    ignoring = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    process = begin(tmp_path, "--iters", 100_000, preexec_fn=ignoring, **ends)
    os.close(theirs)
    wait_for_step(process, tmp_path, 25)
    os.close(ours)
    for options in ([], ["--resume"]):
        assert "another run" in refused(ended(begin(tmp_path, *options)))
    for number in (signal.SIGINT, signal.SIGHUP):
        process.send_signal(number)
    time.sleep(0.02)  # two at once would count as one
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP and step_of(tmp_path) > 25


@pytest.mark.slow
def test_killed_again_and_again():
    kill_and_resume.main(6)


def test_more_iterations_later(alone, copied, resume, succeeded):
    """A finished run goes on, with so large a learning rate that it gets worse.

    Its log and its best model stay.
    """
    old = kill_and_resume.log_lines(alone)
    (copied / "log.csv").write_text("310,undone,,0.001,9.99\n320,1.")
    succeeded(
        resume(
            copied, *OPTIONS, "--iters", STEPS + 30, "--eval-every", 15, "--lr", 5, "--threads", 2
        )
    )
    assert (copied / "best.npz").read_bytes() == (alone / "best.npz").read_bytes()
    new = kill_and_resume.log_lines(copied)
    assert new[: len(old)] == old and [line.split(",")[0] for line in new[len(old) :]] == [
        "310",
        "315",
        "320",
        "330",
    ]
    settings = load_checkpoint(copied / "last.npz")[2]["settings"]
    assert (settings["iters"], settings["eval_every"], settings["lr"]) == (STEPS + 30, 15, 5)


@pytest.mark.parametrize(
    "words, message",
    [
        *(
            (words, f"--resume cannot change {words.split()[0]}")
            for words in (
                "--context 7",
                "--offsets 1;2",
                "--mixer attention",
                "--dropout 0.3",
                "--seed 1",
                "--batch-size 5",
            )
        ),
        ("--no-taps", "--resume cannot change --taps"),
        ("--paper", "--resume cannot change --"),
        ("--out nowhere", "nothing to resume"),
        (f"--iters {STEPS}", f"step {STEPS}; to go on, .* {2 * STEPS}$"),
    ],
)
def test_what_cannot_be_resumed(alone, resume, refused, words, message):
    """Options that change the model or the training are refused by name; so is a run that is
    finished or missing."""
    assert re.search(message, refused(resume(alone, *MORE, *words.split())))


def test_the_text_is_known_by_its_contents(call, resume, succeeded, refused, tmp_path, monkeypatch):
    """This works from another working folder, too.

    Only a missing text makes the program ask for its new place.
    """
    text, out = tmp_path / "text", tmp_path / "out"
    text.write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    succeeded(call("train_char.py", "--iters", 2, "--data", "text", "--out", out))
    monkeypatch.chdir("/")
    moved = text.rename(tmp_path / "moved")
    assert (
        f"cannot read {text}" in (sentence := refused(resume(out, "--iters", 3)))
        and "moved" in sentence
    )
    text.write_text(TEXT.replace("7", "8", 1))
    assert re.search(
        f"change the text: {text} is not the text .* CRLF", refused(resume(out, "--iters", 3))
    )
    text.write_bytes(b"\xff")
    assert (
        "is not UTF-8" in (sentence := refused(resume(out, "--iters", 3)))
        and "moved" not in sentence
    )
    succeeded(resume(out, "--iters", 3, "--data", moved))
    text.unlink()
    succeeded(resume(out, "--iters", 4))  # it is known where the text is now


def test_a_best_model_that_is_gone_is_written_at_the_next_validation(copied, resume, succeeded):
    (copied / "best.npz").unlink()
    assert f"at step {STEPS + 20}\n" in succeeded(resume(copied, *MORE, "--lr", 5))
    assert step_of(copied, "best.npz") == STEPS + 20


NAN, INF, BAD = float("nan"), float("inf"), ["many", {"a": 1}, [[]], None]


@pytest.mark.parametrize(
    "place, values",
    [
        ("step", [*BAD, -1, 10**400, INF]),
        ("seconds", [*BAD, 10**400]),
        ("text_sha256", [None, 5]),
        ("settings", BAD),
        ("recent", [*BAD[1:], [None], [10**400], [NAN]]),
        ("best", [*BAD[:3], [1], [1, None], [INF, 1]]),
        ("log", [None, ["10,3,"], [[]], [[10, "x"]]]),
        ("settings.data", [5, [5]]),
        ("settings.batch_size", [*BAD, 10**30]),
        ("settings.warmup_iters", [*BAD, 0.5]),
        ("settings.lr", [NAN, -1]),
        ("settings.eval_every", [*BAD, 0]),
    ],
)
def test_progress_that_makes_no_sense(alone, resume, refused, with_meta, tmp_path, place, values):
    """It is refused with one sentence, before anything is trained or written."""
    for value in values:
        np.savez(
            last := tmp_path / "last.npz", **with_meta(alone / "last.npz", f"extra.{place}", value)
        )
        before, process = last.read_bytes(), resume(tmp_path, *MORE)
        assert any(word in refused(process) for word in ("make no sense", "memory", "became")), (
            process
        )
        assert last.read_bytes() == before and "val " not in process.stdout


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda last, good: last.write_bytes(good[:999]), "not a usable"),
        (lambda last, good: os.mkfifo(last), "a file"),
    ],
)
def test_damaged_checkpoints(alone, call, resume, refused, tmp_path, damage, message):
    damage(last := tmp_path / "last.npz", (alone / "last.npz").read_bytes())
    for process in (call("sample.py", last), resume(tmp_path, *MORE)):
        assert message in refused(process) and str(last) in process.stderr and process.stdout == ""


def test_a_full_disk(program, alone, copied, refused):
    """The system allows files of 1000 bytes, less than the log needs.

    The old files stay as they are.
    """
    resource = pytest.importorskip("resource")
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # noqa: E731
    process = program("train_char.py", "--resume", "--out", copied, *MORE, preexec_fn=limit)
    assert "File too large" in refused(process) and kill_and_resume.differences(copied, alone) == []
    assert sorted(file.name for file in copied.iterdir()) == ["best.npz", "last.npz", "log.csv"]
