"""A run that is stopped, killed or runs out of disk goes on as if nothing had happened, bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
import time

import kill_and_resume
import pytest
from kill_and_resume import ROOT, TEXT, contents, differences, log_lines
from test_cli import as_root, program, refused, succeeded

import grassmann
import train_char
from grassmann import load_checkpoint

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")

STEPS = 500
OPTIONS = f"--context 8 --n-layer 2 --d-model 8 --rank 3 --batch-size 4 --dropout 0.2 --iters {STEPS} --eval-every 25"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """alone(threads) -> the folder of a run that nobody disturbed."""
    folders = {}

    def run(threads):
        if threads not in folders:
            folders[threads] = tmp_path_factory.mktemp("alone") / "out"
            options = [*OPTIONS.split(), "--threads", threads, "--data", text, "--out", folders[threads]]
            succeeded(program("train_char.py", *options))
        return folders[threads]

    return run


def start(text, out, *options):
    command = [sys.executable, ROOT / "train_char.py", *OPTIONS.split(), "--data", text, "--out", out, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(process, out, step):
    """Until the log says that so many steps are done. The run must have more to do than that."""
    while process.poll() is None:
        try:
            steps = [int(line.split(",")[0]) for line in log_lines(out)[1:] if line]
        except FileNotFoundError:
            steps = []
        if steps and steps[-1] >= step:
            return
        time.sleep(0.001)
    raise AssertionError(f"the run ended first: {process.communicate()}")


def ended(process):
    """What a process that has ended printed, as program() returns it."""
    out, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def resume(out, *options):
    return succeeded(program("train_char.py", "--resume", "--out", out, *options))


# ---- stopped and resumed ------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_a_stopped_run_equals_one_that_was_not(text, alone, tmp_path, threads):
    """Parameters, optimiser, best model and every line of the log but for the seconds."""
    step, options = 0, ["--threads", str(threads)]
    stops = [signal.SIGTERM, signal.SIGKILL, signal.SIGINT]
    while stops:
        process = start(text, tmp_path, *options)
        wait_for_step(process, tmp_path, step + 26)
        process.send_signal(stops[0])
        process = ended(process)
        reached = load_checkpoint(tmp_path / "last.npz")[2]["step"]
        assert step < reached < STEPS
        if stops[0] == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL and reached % 25 == 0
        else:
            assert (process.returncode, process.stderr) == (128 + stops[0], "")
            assert f"stopped at step {reached}" in process.stdout
            assert f"python train_char.py --resume --out {tmp_path}" in process.stdout
            assert (tmp_path / "loss.png").stat().st_size > 0
        if stops[0] == signal.SIGKILL or reached % 5:  # stop once more where log and validation fell on that step
            stops.pop(0)
        step, options = reached, ["--threads", str(threads), "--resume"]
    resume(tmp_path, "--threads", threads)
    assert differences(tmp_path, alone(threads)) == []


def test_more_iterations_later(alone, tmp_path):
    """A finished run goes on at another pace, so fast that it gets worse, and with other threads. What it has logged
    so far stays, and so does its best model."""
    shutil.copytree(alone(1), tmp_path, dirs_exist_ok=True)
    resume(tmp_path, "--threads", 2, "--iters", STEPS + 30, "--eval-every", 15, "--lr", 5)
    assert (tmp_path / "best.npz").read_bytes() == (alone(1) / "best.npz").read_bytes()
    old, new = log_lines(alone(1)), log_lines(tmp_path)
    assert new[: len(old)] == old and new[-1].startswith(f"{STEPS + 30},")
    settings = load_checkpoint(tmp_path / "last.npz")[2]["settings"]
    assert (settings["iters"], settings["eval_every"], settings["lr"]) == (STEPS + 30, 15, 5)


@pytest.mark.parametrize("tail", [f"{STEPS + 10},undone,,0.001,9.99\n{STEPS + 20},1.", "5"])
def test_the_log_ends_where_the_checkpoint_is(alone, tmp_path, tail):
    """Lines of steps that a kill has undone are not logged twice; half a line at the end is dropped."""
    shutil.copytree(alone(1), tmp_path, dirs_exist_ok=True)
    before = log_lines(tmp_path)
    with open(tmp_path / "log.csv", "a", encoding="utf-8") as log:
        log.write(tail)
    resume(tmp_path, "--threads", 1, "--iters", STEPS + 20)
    *after, line, last_line = log_lines(tmp_path)
    assert after == before
    assert line.startswith(f"{STEPS + 10},") and "undone" not in line and last_line.startswith(f"{STEPS + 20},")


def test_differences_are_found(alone):
    """That the comparison of this file can fail: a run with another number of threads differs in its last bits."""
    assert differences(alone(1), alone(1)) == []
    found = differences(alone(1), alone(2))
    assert "log.csv" in found and "last.npz: param" in found and "last.npz: adam_v" in found


def test_a_second_ctrl_c_leaves_at_once(text, tmp_path):
    """The first one waits for the end of the step, and this step takes long."""
    long_step = ["--context", "128", "--batch-size", "1024", "--d-model", "64", "--n-layer", "8", "--threads", "1"]
    process = start(text, tmp_path, *long_step)
    while process.poll() is None and not (tmp_path / "log.csv").exists():  # signals are caught before it is opened
        time.sleep(0.001)
    before = (tmp_path / "last.npz").read_bytes()
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)  # two at once may count as one
    assert process.poll() is None
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    process = ended(process)
    assert process.returncode == -signal.SIGINT and process.stderr == ""
    assert "stopped at step" not in process.stdout and (tmp_path / "last.npz").read_bytes() == before


def test_killed_again_and_again(capsys):
    assert kill_and_resume.main(["--kills", "3"]) == 0, capsys.readouterr().out
    assert "3 kills" in capsys.readouterr().out


# ---- trouble with the disk ----------------------------------------------------------------------------


def in_trouble(process):
    """The sentence with which a run stops, naming where."""
    sentence = refused(ended(process))
    assert str(process.args[process.args.index("--out") + 1]) in sentence
    return sentence


def test_folder_removed_during_the_run(text, tmp_path):
    """Moved away, so that its last checkpoint can be looked at."""
    process = start(text, tmp_path / "out")
    wait_for_step(process, tmp_path / "out", 40)
    (tmp_path / "out").rename(tmp_path / "moved")
    assert "No such file or directory" in in_trouble(process)
    assert not (tmp_path / "out").exists()
    assert 25 <= load_checkpoint(tmp_path / "moved" / "last.npz")[2]["step"] < STEPS


def test_folder_replaced_by_a_file_during_the_run(text, alone, tmp_path):
    process = start(text, tmp_path / "out", "--threads", "1")
    wait_for_step(process, tmp_path / "out", 40)
    (tmp_path / "out").rename(tmp_path / "moved")
    (tmp_path / "out").write_text("mine")
    assert "Not a directory" in in_trouble(process)
    assert (tmp_path / "out").read_text() == "mine"
    (tmp_path / "out").unlink()
    (tmp_path / "moved").rename(tmp_path / "out")  # the trouble is over
    resume(tmp_path / "out", "--threads", 1)
    assert differences(tmp_path / "out", alone(1)) == []


@pytest.mark.skipif(as_root, reason="root may write into a read-only folder")
def test_folder_made_read_only_during_the_run(text, tmp_path):
    process = start(text, tmp_path)
    wait_for_step(process, tmp_path, 40)
    tmp_path.chmod(0o555)
    assert "Permission denied" in in_trouble(process)
    tmp_path.chmod(0o755)
    assert 25 <= load_checkpoint(tmp_path / "last.npz")[2]["step"] < STEPS


def test_folder_gone_before_the_run_is_stopped(text, tmp_path):
    process = start(text, tmp_path / "out", "--eval-every", "1000")
    wait_for_step(process, tmp_path / "out", 20)
    (tmp_path / "out").rename(tmp_path / "moved")
    process.send_signal(signal.SIGTERM)
    assert "No such file or directory" in in_trouble(process)
    load_checkpoint(tmp_path / "moved" / "last.npz")


def test_a_closed_terminal_loses_nothing(text, tmp_path):
    """SIGHUP comes twice, from the terminal and from the shell, here within a step; no validation is near."""
    process = start(text, tmp_path, "--eval-every", "1000", "--batch-size", "4000", "--threads", "1")
    wait_for_step(process, tmp_path, 10)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.02)  # two at once would count as one
    process.send_signal(signal.SIGHUP)
    process = ended(process)
    reached = load_checkpoint(tmp_path / "last.npz")[2]["step"]
    assert (process.returncode, process.stderr) == (128 + signal.SIGHUP, "")
    assert reached >= 10 and f"stopped at step {reached}" in process.stdout


@pytest.mark.parametrize("ignored", [signal.SIGHUP, signal.SIGINT])
def test_an_ignored_signal_is_ignored(text, tmp_path, ignored):
    """As nohup has it, or a script for what it starts in the background."""
    command = [sys.executable, ROOT / "train_char.py", *OPTIONS.split(), "--data", text, "--out", tmp_path]
    ignore = lambda: signal.signal(ignored, signal.SIG_IGN)  # noqa: E731
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, preexec_fn=ignore, **pipes)
    wait_for_step(process, tmp_path, 20)
    process.send_signal(ignored)
    process = ended(process)
    assert (process.returncode, process.stderr) == (0, "")
    assert load_checkpoint(tmp_path / "last.npz")[2]["step"] == STEPS


def test_a_signal_at_the_end_is_too_late(text, tmp_path, monkeypatch, capsys):
    """In the last step: the run is complete, there is nothing to go on with, and it reports as ever."""
    caught, step = [], grassmann.adamw_step

    def interrupted(*args, **how):
        step(*args, **how)
        caught.append(signal.SIGINT)

    options = [*OPTIONS.split(), "--iters", "1", "--data", str(text), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train_char.py", *options])
    monkeypatch.setattr(grassmann, "adamw_step", interrupted)
    monkeypatch.setattr(train_char, "catch_signals", lambda: caught)
    monkeypatch.setattr(train_char, "STOP_SIGNALS", [])
    monkeypatch.setattr(train_char, "plain_output", lambda: None)  # pytest's streams stay as they are
    train_char.main()
    assert "at step 1\n" in capsys.readouterr().out and caught


def test_two_runs_in_one_folder(text, alone, tmp_path):
    """The second is refused, new or resumed; the first goes on."""
    pytest.importorskip("fcntl")
    process = start(text, tmp_path, "--threads", "1")
    wait_for_step(process, tmp_path, 30)
    for how in ("--seed=1", "--resume"):
        assert "another run" in refused(ended(start(text, tmp_path, how)))
    assert process.poll() is None, "too short a run for this test"
    succeeded(ended(process))
    assert differences(tmp_path, alone(1)) == []


def test_what_was_printed_is_on_the_disk(text, tmp_path):
    """The reader of the output leaves before the first validation is printed, as tee does at Ctrl-C."""
    process = start(text, tmp_path, "--eval-every", "100")
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0
    assert load_checkpoint(tmp_path / "last.npz")[2]["step"] == 100


def test_only_the_last_checkpoint_is_left(alone, tmp_path):
    """The next validation writes another best one, whatever the lost one had."""
    shutil.copy(alone(1) / "last.npz", tmp_path)
    printed = resume(tmp_path, "--threads", 1, "--iters", STEPS + 20, "--lr", 5)
    assert load_checkpoint(tmp_path / "best.npz")[2]["step"] == STEPS + 20
    assert f"at step {STEPS + 20}\n" in printed


@pytest.mark.parametrize("first", [b"\xef\xbb\xbf", b"\xff\xfe", b"mine,"])
def test_a_log_that_another_program_has_changed(alone, tmp_path, first):
    """A spreadsheet puts a byte order mark in front."""
    shutil.copytree(alone(1), tmp_path, dirs_exist_ok=True)
    changed = first + (tmp_path / "log.csv").read_bytes()
    (tmp_path / "log.csv").write_bytes(changed)
    assert "log.csv" in refused(program("train_char.py", "--resume", "--out", tmp_path, "--iters", STEPS + 20))
    assert (tmp_path / "log.csv").read_bytes() == changed
    (tmp_path / "log.csv").rename(tmp_path / "old.csv")
    resume(tmp_path, "--iters", STEPS + 20)


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(n_bytes) mounts a file system of that size and returns its folder."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size):
        options = f"size={size}" + (",remount" if os.path.ismount(disk) else "")
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True)
        if mounted.returncode:
            pytest.skip("may not mount a small file system here")
        return disk

    if sys.platform != "linux" or not shutil.which("mount"):
        pytest.skip("has no tmpfs to mount")
    yield mount
    if os.path.ismount(disk):
        subprocess.run(["umount", disk], check=True)


def test_full_disk(text, alone, small_disk):
    """The first checkpoint fits, the best model too, but not the next checkpoint beside them."""
    best, last = ((alone(1) / name).stat().st_size for name in ("best.npz", "last.npz"))
    disk = small_disk(best + last + last // 2)
    process = start(text, disk, "--threads", "1")
    assert "No space left on device" in in_trouble(process)
    assert sorted(file.name for file in disk.iterdir()) == ["best.npz", "last.npz", "log.csv"]
    assert load_checkpoint(disk / "last.npz")[2]["step"] == 0
    small_disk(10 * (best + last))  # now there is room
    resume(disk, "--threads", 1)
    assert differences(disk, alone(1)) == []


def test_disk_too_full_to_begin(text, alone, small_disk):
    disk = small_disk((alone(1) / "last.npz").stat().st_size // 2)
    assert "No space left on device" in in_trouble(start(text, disk))
    assert list(disk.iterdir()) == []


def test_resume_on_a_full_disk(text, alone, small_disk):
    """It stops, and loses nothing of what was there before."""
    disk = small_disk(10**7)
    shutil.copytree(alone(1), disk, dirs_exist_ok=True)
    logged = log_lines(disk)
    with open(disk / "filler", "wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(bytes(4096))
    process = start(text, disk, "--resume", "--threads", "1", "--iters", str(STEPS + 20))
    assert "No space left on device" in in_trouble(process)
    assert log_lines(disk)[: len(logged)] == logged
    assert contents(disk / "last.npz") == contents(alone(1) / "last.npz")


def test_a_log_that_cannot_be_written_keeps_its_lines(text, alone, tmp_path):
    """The system lets the program write 1000 bytes into a file and not one more, less than the log has."""
    resource = pytest.importorskip("resource")
    shutil.copytree(alone(1), tmp_path, dirs_exist_ok=True)
    logged = log_lines(tmp_path)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # noqa: E731
    refused(program("train_char.py", "--resume", "--out", tmp_path, "--iters", STEPS + 20, preexec_fn=limit))
    assert log_lines(tmp_path)[: len(logged)] == logged
    assert contents(tmp_path / "last.npz") == contents(alone(1) / "last.npz")
