"""train_char.py: the files and the output of a run, its options, and its errors."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
from kill_and_resume import MODEL, ROOT, TEXT

import grassmann
import train_char
from charlm import text as texts
from charlm.checkpoint import load_checkpoint
from charlm.text import decode, encode, vocabulary
from grassmann import Config, generate, validation_loss

LOG = ["step", "train_loss", "val_loss", "lr", "grad_norm", "tokens_per_second", "train_seconds"]
FILES = ["best.npz", "last.npz", "log.csv", "loss.png"]
HOSTILE = "\x1b[2J\u202e"  # clears a screen and turns the direction of writing


def validated(checkpoint):
    """The validation loss of a checkpoint, on the last tenth of TEXT."""
    params, config, extra = load_checkpoint(checkpoint)
    return validation_loss(params, config, encode(TEXT, extra["vocab"])[-(len(TEXT) // 10) :])


def made(*words):
    """The run that these options ask for; nothing is trained or written."""
    return train_char.make_run(train_char.build_parser().parse_args([*map(str, words)]))


def test_a_run_leaves_a_log_a_picture_and_a_sample(trained, text):
    """The log has a row every ten steps and at each validation.

    A validation prints 70 characters of the model.
    """
    out, printed = trained
    assert sorted(file.name for file in out.iterdir()) == FILES
    header, *rows = [line.split(",") for line in (out / "log.csv").read_text().splitlines()]
    rate = train_char.Training(iters=30, lr=0.1, warmup_iters=0).rate
    assert header == LOG
    assert [(row[0], bool(row[2])) for row in rows] == [
        ("10", False),
        ("15", True),
        ("20", False),
        ("30", True),
    ]
    for step, train_loss, _, lr, norm, pace, seconds in rows:
        assert float(lr) == rate(int(step) - 1)
        assert 0 < float(train_loss) < 4
        assert 0 < float(norm) < 100
        assert int(pace) > 0
        assert 0 < float(seconds) < 100
    picture = matplotlib.image.imread(out / "loss.png")
    assert len(np.unique(picture.reshape(-1, 4), axis=0)) > 10  # not an empty page
    head, written = printed.split("A sample:\n\n")
    assert head.startswith(
        f"{text}: 3,811 characters to train on, 423 to validate, 17 different ones\n"
    )
    assert len(written) == 600 + 1 and set(written) <= set(TEXT)
    params, config, extra = load_checkpoint(out / "last.npz")
    assert (
        f"best validation loss {extra['best'][1]:.4f} nats, {extra['best'][1] / np.log(2):.4f} bits"
        in head
    )
    line = decode(generate(params, config, [extra["vocab"].index(10)], 70, 0.8), extra["vocab"])
    shown = re.findall(r"(?m)^step +(\d+) .* nats/char .*\n  (.{70})$", printed)
    assert [step for step, _ in shown] == ["15", "30"] and shown[1][1] == line.replace(
        "\n", "⏎"
    ) != shown[0][1]


def test_checkpoints_hold_the_best_and_the_last_state(call, succeeded, tmp_path):
    """In a run with so large a learning rate that the loss goes up and down."""
    restless = ["--lr", 0.3, "--min-lr", 0.3, "--warmup-iters", 0, "--iters", 15, "--eval-every", 1]
    succeeded(call("train_char.py", *restless, "--out", tmp_path))
    best, last = (load_checkpoint(tmp_path / name)[2] for name in ("best.npz", "last.npz"))
    losses = {step: val_loss for step, _, val_loss, *_ in last["log"]}
    assert list(losses) == list(range(1, 16)) and sorted(losses.values(), reverse=True) != list(
        losses.values()
    )
    assert validated(tmp_path / "best.npz") == losses[best["step"]] == min(losses.values())
    assert validated(tmp_path / "last.npz") == losses[15] and last["step"] == 15
    assert best["best"] == last["best"] == [best["step"], min(losses.values())] and last[
        "vocab"
    ] == vocabulary(TEXT)
    assert {"adam_m", "adam_v"} <= last.keys() and not {"adam_m", "adam_v"} & best.keys()


def test_a_second_run_moves_the_first_one_aside(call, succeeded, refused, trained, tmp_path):
    """Files that are not ours stay; an impossible run moves nothing."""
    out = shutil.copytree(trained[0], tmp_path / "out")
    (out / "notes.md").write_text("mine")
    before = {name: (out / name).read_bytes() for name in FILES}
    refused(call("train_char.py", "--context", 10**5, "--out", out))
    for number in (1, 2):
        assert {name: (out / name).read_bytes() for name in before} == before
        assert f"previous-{number}" in succeeded(call("train_char.py", "--iters", 2, "--out", out))
        assert {name: (out / f"previous-{number}" / name).read_bytes() for name in before} == before
        before = {name: (out / name).read_bytes() for name in FILES[:3]}
    assert (out / "notes.md").exists()


def test_files_of_others_are_never_moved(call, succeeded, refused, tmp_path):
    (page := tmp_path / "explorer.html").write_text("mine")
    (log := tmp_path / "log.csv").write_text("mine")
    assert (
        "no run" in refused(call("train_char.py", "--iters", 2, "--out", tmp_path))
        and log.read_text() == "mine"
    )
    log.unlink()
    succeeded(call("train_char.py", "--iters", 2, "--out", tmp_path))
    assert page.read_text() == "mine"


def test_a_run_in_the_folder_of_its_text(call, succeeded, tmp_path):
    """Files that the programs write there are not text: the run resumes, and another run has the
    same text."""
    (tmp_path / "a.txt").write_text(TEXT)
    for how in (
        ["--iters", 2],
        ["--resume", "--iters", 4],
        ["--iters", 2],
        ["--resume", "--iters", 3],
    ):
        given = ["--data", tmp_path] * ("--resume" not in how)
        assert "3,811 characters" in succeeded(
            call("train_char.py", *how, *given, "--out", tmp_path)
        )
        (tmp_path / "log.csv.tmp").write_text("of a killed run")


def test_no_option_is_lost():
    names = {
        *train_char.DEFAULTS,
        "no_taps",
        "out",
        "preset",
        "paper",
        "resume",
        "threads",
        "gpu",
        "precision",
    }
    assert {*map(train_char.flag, names)} <= train_char.build_parser()._option_string_actions.keys()


def test_an_option_beats_a_preset_and_the_model_of_the_paper(text):
    settings = made("--data", text, "--preset", "tiny", "--rank", 4).settings
    assert settings == train_char.DEFAULTS | train_char.PRESETS["tiny"] | {
        "rank": 4,
        "data": [str(text)],
    }
    assert made(
        "--data", text, *MODEL, "--paper", "--n-layer", 6, "--no-positions"
    ).config == Config(
        17,
        8,
        6,
        8,
        3,
        ((1,), (2,), (4,), (1,), (1,), (1,)),
        32,
        block="paper",
        taps=False,
        normalize=True,
    )


def test_options_that_would_be_ignored(call, refused, text, tmp_path, capsys):
    """They are refused. Those that a preset or --paper brings are named and left out."""
    for words in ("--memory", "--no-memory", "--rank 3", "--taps", "--offsets 1", "--normalize"):
        process = call(
            "train_char.py", "--mixer", "attention", *words.split(), "--out", tmp_path / "out"
        )
        assert "is of no use with --mixer attention" in refused(process)
    for word in ("--memory", "--normalize", "--n-head=2"):
        process = call(
            "train_char.py",
            "--mixer",
            ROOT / "docs" / "my_layer.py",
            word,
            "--out",
            tmp_path / "out",
        )
        assert f"{word.partition('=')[0]} is of no use with --mixer my_layer.py#" in refused(
            process
        )
    assert "--n-head is of no use" in refused(
        call("train_char.py", "--n-head", 2, "--out", tmp_path / "out")
    )
    config = made(
        "--data", text, "--preset", "best", "--paper", "--mixer", "attention", "--n-head", 2
    ).config
    assert (config.n_layer, config.block, config.n_head, config.offsets) == (6, "paper", 2, ())
    assert (
        capsys.readouterr().out
        == "--mixer attention has no use for --offsets, --taps, --normalize: left out\n"
    )


@pytest.mark.skipif(os.name != "posix", reason="the commands to copy are those of a shell")
def test_commands_run_as_they_are_printed(program, text, succeeded, plain, tmp_path):
    """In a folder with an odd name, without matplotlib, and with a PMI_SIZE that does not come
    from MPI."""
    options = [
        *MODEL,
        "--data",
        text,
        "--iters",
        2,
        "--threads",
        1,
        "--out",
        "./-$\\frac$ 模型, a=b;c",
    ]
    printed = succeeded(
        program("train_char.py", *options, cwd=tmp_path, env=plain | {"PMI_SIZE": "abc"})
    )
    assert "\nno loss.png: ModuleNotFoundError" in printed
    for command in re.findall(r"(?m)^.*(?:sample\.py|--resume) .*$", printed):
        subprocess.run(
            command, shell=True, cwd=tmp_path, env=plain, capture_output=True, check=True
        )
    assert load_checkpoint(tmp_path / options[-1] / "last.npz")[2]["step"] == 4  # twice as many


def test_a_library_import_changes_nothing():
    check = """
import os, sys
env = dict(os.environ)
from charlm import checkpoint, own_layer, processes, run, text, training
assert "charlm.command_line" not in sys.modules
from charlm import command_line
assert env == os.environ
assert sys.excepthook is sys.__excepthook__
"""
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True)


def test_ctrl_c_in_the_final_sample(call, tmp_path, monkeypatch):
    """It stops at once, and the run is saved."""

    def pressed(params, config, tokens, n, *args, **how):
        for k, token in enumerate(generate(params, config, tokens, n, *args, **how)):
            if (k, n) == (5, 600):
                signal.raise_signal(signal.SIGINT)
            yield token

    monkeypatch.setattr(grassmann, "generate", pressed)
    process = call("train_char.py", "--iters", 2, "--out", tmp_path)
    assert (process.returncode, process.stderr) == (130, "") and len(
        process.stdout.split("A sample:\n\n")[1]
    ) == 5
    assert load_checkpoint(tmp_path / "last.npz")[2]["step"] == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("how", ["| head -1", ">/dev/full"])
def test_a_run_goes_on_when_nobody_reads(text, plain, tmp_path, how):
    words = [*MODEL, "--data", text, "--out", tmp_path, "--iters", "40", "--eval-every", "10"]
    command = f"{shlex.join(map(str, [sys.executable, ROOT / 'train_char.py', *words]))} {how}"
    process = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, env=plain
    )
    assert (process.returncode, process.stderr) == (0, b"")
    assert load_checkpoint(tmp_path / "last.npz")[2]["step"] == 40


@pytest.mark.parametrize(
    "name, make, message",
    [
        (HOSTILE, lambda path: None, r"\x1b[2J\u202e: No such file"),
        ("UTF-16", lambda path: path.write_text(TEXT, "utf-16"), "iconv -f UTF-16 -t UTF-8"),
        (
            "in 'quotes'",
            lambda path: path.write_text("é" * 99, "latin-1"),
            "iconv -f WINDOWS-1252 -t UTF-8 '",
        ),
        (
            "folder",
            lambda path: (path.mkdir(), (path / "a").write_text("é", "latin-1")),
            "/a is not UTF-8 text; save it",
        ),
        ("endless", lambda path: path.symlink_to("/dev/zero"), "GB, or endless"),
    ],
)
def test_bad_texts(call, refused, tmp_path, monkeypatch, name, make, message):
    monkeypatch.setattr(texts, "MOST_BYTES", 10_000)
    make(bad := tmp_path / name)
    assert message in refused(call("train_char.py", "--data", bad, "--out", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        ("--offsets 1;8", "offsets"),
        ("--offsets 1;x", "1;x"),
        ("--d-model 1000000", "memory"),
        ("--lr nan", "nan"),
        ("--context 300000", ".txt has 4,234"),
        ("--iters 0", "iters must be 1 or more"),
        ("--iter 5", "iter"),
        ("--batch-size 0", "batch_size must be 1 or more"),
        ("--threads -1", "--threads"),
        ("--iters 1.5", "1.5"),
        ("--eval-every 0", "--eval-every"),
        (f"--warmup-iters 1{'0' * 400}", "too large"),
        ("--warmup-iters 6", "--warmup-iters 6 is longer than the run, --iters 5"),
        ("--min-lr 1", "min_lr, 1.0, is higher than lr"),
        ("--batch_size 4", "did you mean --batch-size?"),
        ("--max-iters 4", "did you mean --iters?"),
        ("--block_size=4", "did you mean --context?"),
        (f"--d-model 1{'0' * 400}", "too large"),
        ("--out=", "needs the name of a folder"),
        ("stray", "cannot read"),
        ("--data ", "--data needs the name"),
        ("--precision tf32", "--gpu"),
        ("--preset huge", "choose from"),
        (f"--{HOSTILE}", r"\x1b[2J\u202e"),
    ],
)
def test_bad_options(call, refused, tmp_path, words, message):
    process = call("train_char.py", "--iters", 5, *words.split(" "), "--out", tmp_path / "out")
    assert message in refused(process) and process.stdout == "" and not (tmp_path / "out").exists()


def test_folders_that_cannot_be_written(call, refused, tmp_path, monkeypatch):
    """A file in the way, a name that is too long, a broken link, a working folder that was
    deleted."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for out in ("file", "file/under", "x" * 300, "link"):
        assert str(tmp_path / out) in refused(
            call("train_char.py", "--iters", 2, "--out", tmp_path / out)
        )
    (tmp_path / "deleted").mkdir()
    monkeypatch.chdir(tmp_path / "deleted")
    (tmp_path / "deleted").rmdir()
    for options in ([], ["--data", "relative"]):
        assert "No such file" in refused(call("train_char.py", "--iters", 2, *options))
    assert (tmp_path / "file").read_text() == "mine"


def test_names_of_files_are_escaped_in_all_that_is_printed(call, succeeded, tmp_path):
    """A name may hold characters that clear a screen: a folder of texts, and the place of an
    earlier run."""
    (folder := tmp_path / f"{HOSTILE}texts").mkdir()
    (folder / f"a.{HOSTILE}").write_text(TEXT)
    for _ in range(2):
        printed = succeeded(
            call("train_char.py", "--iters", 2, "--data", folder, "--out", tmp_path / HOSTILE)
        )
        assert printed.replace("\n", "").isprintable() and r"\x1b[2J\u202etexts" in printed
    assert "previous-1" in printed


@pytest.mark.parametrize("every", [1, 10, 1000])
def test_a_loss_that_is_not_a_number_stops_the_run(call, refused, tmp_path, every):
    """The error names the step, and the files hold the last state that was still good."""
    diverging = (
        "--lr 10 --grad-clip 0 --warmup-iters 0 --weight-decay 10 --iters 200 --dropout 0.1 "
        "--eval-every"
    )
    sentence = refused(call("train_char.py", *diverging.split(), every, "--out", tmp_path))
    step = re.search(r"(?:at|before) step (\d+): lower --weight-decay", sentence)
    assert step and load_checkpoint(tmp_path / "last.npz")[2]["step"] < int(step[1])
    assert (
        np.isfinite(validated(tmp_path / "last.npz"))
        and "nan" not in (tmp_path / "log.csv").read_text()
    )


def test_a_mistake_of_the_program_keeps_its_traceback(call, tmp_path, monkeypatch):
    """Only a UserError is shortened to its message."""
    monkeypatch.setattr(grassmann, "get_batch", lambda *args: np.zeros(3) + np.zeros(2))
    with pytest.raises(ValueError, match="could not be broadcast"):
        call("train_char.py", "--iters", 2, "--out", tmp_path)


def test_a_trained_model_goes_on_with_another_text(trained, text, tmp_path, capsys):
    """Its sizes and weights; the embedding follows the characters of the new text."""
    other = tmp_path / "other.txt"
    other.write_text(TEXT.replace("7", "é"))
    best = trained[0] / "best.npz"
    params, config, extra = load_checkpoint(best)
    run = made("--data", other, "--init", best, "--iters", 5)
    assert run.at.step == 0
    assert (run.config.n_layer, run.config.d_model) == (config.n_layer, config.d_model)
    vocab = run.corpus.vocab
    for name in params.keys() - {"E"}:
        np.testing.assert_array_equal(run.params[name], params[name])
    fresh = grassmann.init_params(run.config, run.training.seed)["E"]
    for k, point in enumerate(vocab):
        expected = fresh[k]
        if point in extra["vocab"]:
            expected = params["E"][extra["vocab"].index(point)]
        np.testing.assert_array_equal(run.params["E"][k], expected)
    assert "new: 'é'; gone: '7'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--d-model", 16], "--init cannot change --d-model"),
        (["--resume"], "--init begins a run"),
    ],
)
def test_what_init_cannot_do(trained, text, words, message):
    with pytest.raises(grassmann.UserError, match=message):
        made("--init", trained[0] / "best.npz", *words, text)


def test_text_from_standard_input(program, text, succeeded, tmp_path):
    """It is trained on, and --resume reads it again."""
    words = [*MODEL, "--iters", 2, "--threads", 1, "--out", tmp_path, "-"]
    with text.open("rb") as stdin:
        printed = succeeded(program("train_char.py", *words, stdin=stdin))
    assert "3,811 characters to train on" in printed


def test_a_text_may_stand_alone(text):
    assert made(text).settings["data"] == [str(text)]


def test_sizes_that_a_preset_gives_do_not_stand_in_the_way(text):
    config = made(text, "--preset", "best", "--n-layer", 4, "--context", 64).config
    assert len(config.offsets) == 4


def test_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = train_char.build_parser().parse_args(["--out=~/runs"])
    assert args.out == tmp_path / "runs"


def test_ctrl_c_while_packages_are_imported(program, plain, tmp_path):
    (tmp_path / "tqdm.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    process = program("train_char.py", env=plain | {"PYTHONPATH": str(tmp_path)})
    assert (process.returncode, process.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize("variable", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_mpiexec_without_mpi4py(program, refused, plain, tmp_path, variable):
    (tmp_path / "mpi4py.py").write_text("raise ImportError('not here')")
    env = plain | {"PYTHONPATH": str(tmp_path), variable: "2"}
    assert "mpi4py does not work here (not here)" in refused(program("train_char.py", env=env))


def test_a_package_that_is_missing(plain, tmp_path):
    """-S: without site-packages."""
    process = subprocess.run(
        [sys.executable, "-S", ROOT / "train_char.py"], capture_output=True, text=True, cwd=tmp_path
    )
    assert process.stderr == "numpy is missing: pip install -r requirements.txt\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_output_is_not_blamed_on_the_folder(plain, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("short")
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, ROOT / "train_char.py", tmp_path / "texts", "--out", tmp_path / "o"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=plain,
        )
    assert process.returncode == 2
    assert "train_char.py: " in process.stderr
    assert f"{tmp_path / 'o'}: No space" not in process.stderr
    assert "Exception ignored" not in process.stderr


def test_the_command_to_go_on_keeps_the_threads(trained):
    assert re.search(r"--resume --out \S+ --threads 1 --iters 60", trained[1])


def test_no_picture_is_promised_that_was_not_drawn(call, succeeded, tmp_path):
    assert "loss.png" not in succeeded(call("train_char.py", "--iters", 2, "--out", tmp_path))
