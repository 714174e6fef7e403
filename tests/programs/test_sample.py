"""sample.py: what it writes, where prompts come from, what is refused."""

import os
import re
import sys

import numpy as np
import pytest

import grassmann
from charlm.checkpoint import load_checkpoint, save_checkpoint
from charlm.text import decode, encode, vocabulary
from charlm.trained import continue_text, write_text
from grassmann import Config, generate, init_params


@pytest.fixture
def best(trained):
    return trained[0] / "best.npz"


@pytest.fixture
def sampled(call, succeeded, best):
    """sampled(*options) -> what is printed; the seed is 0 unless given."""
    return lambda *args, **how: succeeded(call("sample.py", best, "--seed", 0, *args, **how))


@pytest.fixture
def odd(tmp_path):
    def odd(characters, scale=1, **more):
        """A checkpoint of a model that knows only these."""
        config = Config(len(vocabulary(characters)), context=8, n_layer=1, d_model=8, rank=3)
        params = {name: scale * value for name, value in init_params(config).items()}
        save_checkpoint(
            tmp_path / "odd",
            params,
            config,
            **{"vocab": vocabulary(characters), "most_common": 0} | more,
        )
        return tmp_path / "odd"

    return odd


def test_it_prints_the_prompt_and_what_generate_draws(call, sampled, best):
    params, config, extra = load_checkpoint(best)

    def drawn(prompt, n, temperature=0.8, **how):
        tokens = generate(
            params, config, encode(prompt or "\n", extra["vocab"]), n, temperature, **how
        )
        return prompt + decode(tokens, extra["vocab"]) + "\n"

    options = ["--prompt", "12 times", "--temperature", 1.2, "--top-k", 5, "--seed", 3]
    assert sampled("--length", 70, *options) == drawn("12 times", 70, 1.2, top_k=5, seed=3)
    assert sampled("--length", 50) == sampled("--length", 50, "--prompt=") == drawn("", 50, seed=0)
    assert sampled("--length", 50, "--prompt", "-", stdin=b"3 is\r\n4") == drawn(
        "3 is\n4", 50, seed=0
    )
    one, other = (call("sample.py", best, "--length", 60) for _ in range(2))
    assert one.stdout != other.stdout  # a new seed, which can be given again
    assert (
        sampled("--length", 60, *re.fullmatch("(--seed) (.+) writes this.*\n", one.stderr).groups())
        == one.stdout
    )


def test_characters_appear_as_they_are_drawn(start, best):
    """They do not wait until a buffer is full. At the end the reader leaves, as `head` does."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with start(
        "sample.py", best, "--length", 10**9, "--seed", 0, "--prompt", "7", env=env
    ) as process:
        first, second = (os.read(process.stdout.fileno(), 10**6) for _ in range(2))
        assert process.poll() is None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0 and first.startswith(b"7") and len(first + second) < 1000


def test_last_where_there_is_no_best(call, trained, tmp_path):
    """After a run that was stopped before its first validation; the name would clear a screen."""
    (folder := tmp_path / "\x1b[2J").mkdir()
    (folder / "last.npz").write_bytes((trained[0] / "last.npz").read_bytes())
    process, shown = (
        call("sample.py", folder / "best.npz", "--seed", 0, "--length", 20),
        f"{tmp_path}/\\x1b[2J",
    )
    assert process.returncode == 0 and len(process.stdout) == 20 + 1
    assert process.stderr == f"there is no {shown}/best.npz yet; using {shown}/last.npz\n"


def test_control_characters_are_escaped_on_a_terminal(odd, monkeypatch, capsys):
    """A text may hold characters that clear a screen. A file gets them unchanged."""
    trained = load_checkpoint(odd("\x1b[2J\x07\x9b\n\r\u202e"))
    for terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        prompt = "\x1b[2J"
        write_text(prompt, continue_text(grassmann, *trained, prompt, 200, seed=0))
        shown, hostile = capsys.readouterr().out, {*"\x1b\x07\x9b\u202e"}
        assert (
            hostile & {*shown} == (set() if terminal else hostile)
            and shown.startswith(r"\x1b[2J") == terminal
        )


@pytest.mark.parametrize(
    "words, message",
    [
        ("--length -1", "-1"),
        ("--temperature nan", "temperature"),
        ("--top-k 0", "top_k"),
        ("--seed -1", "--seed"),
        ("--prompt -x", "(if it begins with a dash, write --option=-value)"),
        ("--precision tf32", "--gpu"),
        ("--prompt Ω你", "not in the model's vocabulary: 'Ω' '你'"),
        ("--prompt 12\udcff", r"'\udcff'; this is not UTF-8"),
        ("--prompt -", "not UTF-8"),
        ("--prompt=\x1b", r"'\x1b'"),
        ("two\nlines", "two lines"),
        ("", "is not a file"),
    ],
)
def test_bad_options(call, refused, best, words, message):
    process = call("sample.py", *[best] * words.startswith("-"), *words.split(" "), stdin=b"\xfe")
    assert message in refused(process) and process.stdout == ""


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"scale": np.float32(1e37)},
            "not finite",
        ),  # finite weights that overflow: a run that has diverged
        *(
            ({"most_common": start}, "not written by train_char")
            for start in (5, -1, "a", None, [])
        ),
        ({"vocab": None}, "was not written by train_char.py"),
    ],
)
def test_checkpoints_that_cannot_be_sampled_from(call, refused, odd, changes, message):
    assert message in refused(call("sample.py", odd("abcde", **changes), "--seed", 0))
