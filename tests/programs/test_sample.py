"""sample.py: what it writes, where prompts come from, what is refused."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
from kill_and_resume import ROOT

from checkpoint import load_checkpoint, save_checkpoint
from grassmann import Config, generate, init_params
from text import decode, encode, vocabulary


@pytest.fixture
def best(trained):
    return trained[0] / "best.npz"

@pytest.fixture
def sampled(call, succeeded, best):
    """sampled(*options) -> what is printed; the seed is 0 unless given."""
    return lambda *args, at=best, **how: succeeded(call("sample.py", at, "--seed", 0, *args, **how))

@pytest.fixture
def drawn(best):
    """drawn(prompt, n) -> the prompt and what the model draws after it."""
    params, config, extra = load_checkpoint(best)

    def drawn(prompt, n, temperature=0.8, **how):
        tokens = encode(prompt or "\n", extra["vocab"])
        tokens = generate(params, config, tokens, n, temperature, **how)
        return prompt + decode(tokens, extra["vocab"])

    return drawn

@pytest.fixture
def odd(tmp_path):
    """odd(characters) -> a checkpoint that knows only these."""

    def odd(characters, scale=1, **more):
        extra = {"vocab": vocabulary(characters), "most_common": 0} | more
        config = Config(len(vocabulary(characters)), context=8, n_layer=1, d_model=8, rank=3)
        params = {name: scale * value for name, value in init_params(config).items()}
        save_checkpoint(tmp_path / "odd.npz", params, config, **extra)
        return tmp_path / "odd.npz"

    return odd

def test_it_prints_the_prompt_and_what_generate_draws(sampled, drawn):
    flags = ["--prompt", "12 times", "--temperature", 1.2, "--top-k", 5, "--seed", 3]
    expected = drawn("12 times", 70, 1.2, top_k=5, seed=3)
    assert sampled("--length", 70, *flags) == f"{expected}\n"
    assert sampled("--length", 50) == sampled("--length", 50, "--prompt=") == drawn("", 50) + "\n"
    for options in (["--temperature", 0], ["--top-k", 1], ["--temperature", 1e-300]):
        assert sampled("--length", 40, "--seed", 9, *options) == drawn("", 40, 0) + "\n"

def test_several_samples_are_those_of_consecutive_seeds(sampled):
    last = 2**63 - 1
    texts = [sampled("--length", 40, "--seed", seed) for seed in (last - 1, last)]
    whole = sampled("--length", 40, "--seed", last - 1, "--samples", 3).split("-" * 40 + "\n")
    assert whole[:2] == texts and len({*whole}) == 3

def test_a_new_seed_each_time_that_can_be_given_again(call, sampled, best):
    first, second = (call("sample.py", best, "--length", 60) for _ in range(2))
    assert first.returncode == 0 and first.stdout != second.stdout
    seed = re.fullmatch(r"--seed (\d+) writes this again\n", first.stderr)[1]
    assert sampled("--length", 60, "--seed", seed) == first.stdout

def test_characters_appear_as_they_are_drawn(start, best):
    """The program, which would never end, is read while it writes: some characters are there at
    once. (Were they held back, they would come by the thousand, when the buffer is full.) Then the
    reader leaves, as `head` does."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with start("sample.py", best, "--length", 10**9, "--prompt", "7", env=env) as process:
        first, second = (os.read(process.stdout.fileno(), 10**6) for _ in range(2))
        assert process.poll() is None
        process.stdout.close()
        assert re.fullmatch(r"--seed \d+ writes this again\n", process.stderr.read())
    assert process.returncode == 0 and first.startswith(b"7") and len(first + second) < 1000

def test_last_where_there_is_no_best(call, trained, sampled, tmp_path):
    """A run that was stopped before its first validation."""
    best, last = tmp_path / "best.npz", tmp_path / "last.npz"
    last.write_bytes((trained[0] / "last.npz").read_bytes())
    process = call("sample.py", best, "--seed", 0, "--length", 20)
    assert process.stderr == f"there is no {best} yet, so this is {last}\n"
    assert (process.returncode, process.stdout) == (0, sampled("--length", 20, at=last))

def test_where_prompts_come_from(sampled, tmp_path):
    (tmp_path / "prompt").write_text("2 times\n")
    none = ["--length", 0, "--prompt"]
    assert sampled(*none, f"@{tmp_path / 'prompt'}") == "2 times\n\n"
    assert sampled(*none, "-", stdin="3 is\n4") == "3 is\n4\n"
    assert sampled(*none, r"1\n2", "--escapes") == "1\n2\n"

def test_a_conversation(sampled, drawn, on_terminal, best):
    """Each answer goes on from all before it, which is not printed again."""
    options = ["--interactive", "--length", 9, "--prompt", "1 is"]
    _, first, unknown, second, end = sampled(*options, stdin="2 is\nxyz\n\n").split("> ")
    text = drawn("1 is2 is", 9, seed=0)
    assert first == text.removeprefix("1 is") + "\n" and "'x' 'y' 'z'" in unknown
    assert second == drawn(text, 9, seed=2).removeprefix(text) + "\n" and end == "\n"
    options = ["--interactive", "--length", 3, "--seed", 0]
    code, shown = on_terminal("sample.py", best, *options, keys="2 is\n\x04")
    assert code == 0 and drawn("2 is", 3).replace("\n", "\r\n") + "\r\n> " in shown

def test_control_characters_are_escaped_on_a_terminal(on_terminal, sampled, odd):
    """A text may hold what clears a screen; into a file it goes as it is."""
    at = odd("\x1b[2J\x07\x9b\n\r\u202e")
    code, shown = on_terminal("sample.py", at, "--length", 200, "--seed", 0, "--prompt", "\x1b[2J")
    assert code == 0 and not {*shown} & {*"\x1b\x07\x9b\u202e"}
    assert shown.startswith(r"\x1b[2J")
    assert all(escape in shown for escape in (r"\x07", r"\x9b", r"\u202e"))
    assert {*"\x1b\x07\x9b\u202e"} <= {*sampled("--length", 200, at=at)}

@pytest.mark.parametrize("flags, env", [
    ("-I", {}), ("-P", {}), ("-OO", {"LC_ALL": "C"}), ("-OO", {"LC_ALL": "C", "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"})])
def test_other_ways_to_start_python(odd, flags, env):
    """-I and -P leave the program's folder out of its path; a prompt is UTF-8 in any locale."""
    if flags == "-P" and sys.version_info < (3, 11):
        pytest.skip("this Python has no -P")
    command = [sys.executable, flags, ROOT / "sample.py", odd("你好"), "--length", "5", "--prompt"]
    done = subprocess.run([*command, "你好".encode()], capture_output=True, env=os.environ | env)
    assert done.returncode == 0 and done.stdout.startswith("你好".encode()), done

@pytest.mark.parametrize("flags, message", [
    ("--length -1", "--length: -1 is not between 0"), ("--temperature nan", "--temperature"),
    ("--top-k 0", "--top-k"), ("--samples 0", "--samples"), (f"--seed {2**63}", "--seed"),
    ("--prompt -x", "(one that begins with a dash is written --option=-value)"), ("--wild", "wild"),
    ("--precision tf32", "--gpu"), ("--prompt Ω你", "not in the model's vocabulary: 'Ω' '你'"),
    ("--prompt 12\udcff", r"'\udcff'"), ("--prompt=\x1b", r"'\x1b'"), ("two\nlines", "two lines"),
    ("--prompt @nowhere", "cannot read nowhere: No such file"), ("--interactive --prompt é", "é")])
def test_bad_options(call, refused, best, flags, message):
    words = flags.split(" ")
    process = call("sample.py", *[best] * flags.startswith("-"), *words)
    assert message in refused(process) and process.stdout == ""

@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("how, code", [
    ("<&- --prompt -", 0), ("<&- --interactive", 0), (">&-", 0), ("2>&-", 0), (">/dev/full", 2)])
def test_streams_that_are_closed_or_full(best, how, code):
    command = f"{sys.executable} {ROOT / 'sample.py'} {best} --length 5 --seed 0 {how}"
    process = subprocess.run(command, shell=True, capture_output=True, text=True)
    full = "sample.py: standard output: No space left on device\n" * (code > 0)
    assert (process.returncode, process.stderr) == (code, full)

@pytest.mark.parametrize("changes, message", [
    ({"scale": np.float32(1e37)}, "not finite"),  # of finite weights; a run that has diverged
    *(({"most_common": start}, "not written by train_char") for start in (5, -1, 1.0, "a", None)),
    ({"vocab": None}, "was not written by train_char.py")])
def test_checkpoints_that_cannot_be_sampled_from(call, refused, odd, changes, message):
    assert message in refused(call("sample.py", odd("abcde", **changes), "--seed", 0))
