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
def odd(tmp_path):
    """odd(characters) -> a checkpoint that knows only these."""

    def odd(characters):
        vocab = vocabulary(characters)
        config = Config(len(vocab), context=8, n_layer=1, d_model=8, rank=3)
        save_checkpoint(tmp_path / "odd.npz", init_params(config), config, vocab=vocab, most_common=0)
        return tmp_path / "odd.npz"

    return odd


# ---- what is written -----------------------------------------------------------------------------


def test_it_prints_the_prompt_and_what_generate_draws(sampled, best):
    params, config, extra = load_checkpoint(best)
    prompt = encode("12 times", extra["vocab"])
    tokens = generate(params, config, prompt, 70, temperature=1.2, top_k=5, seed=3)
    flags = ["--prompt", "12 times", "--length", 70, "--temperature", 1.2, "--top-k", 5, "--seed", 3]
    assert sampled(*flags) == "12 times" + decode(tokens, extra["vocab"]) + "\n"


def test_an_empty_prompt_starts_a_line(sampled, best):
    params, config, extra = load_checkpoint(best)
    tokens = generate(params, config, [extra["vocab"].index(10)], 50, temperature=0.8, seed=0)
    written = sampled("--length", 50)
    assert written == decode(tokens, extra["vocab"]) + "\n" == sampled("--length", 50, "--prompt", "")


def test_several_samples_are_those_of_consecutive_seeds(sampled):
    seeds = range(2**63 - 1, 2**63 + 2)
    whole = sampled("--length", 40, "--seed", seeds[0], "--samples", 3).split("-" * 40 + "\n")
    assert len(set(whole)) == 3
    assert whole[0] == sampled("--length", 40, "--seed", seeds[0])
    assert sampled("--length", 40, "--seed", 5, "--samples", 2).endswith(
        "-" * 40 + "\n" + sampled("--length", 40, "--seed", 6))


def test_temperature_zero_and_top_1_leave_no_choice(sampled):
    greedy = sampled("--length", 40, "--temperature", 0)
    for options in (["--temperature", 0], ["--top-k", 1], ["--temperature", 1e-300]):
        assert sampled("--length", 40, "--seed", 9, *options) == greedy


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
        first = os.read(process.stdout.fileno(), 10**6)
        second = os.read(process.stdout.fileno(), 10**6)
        assert process.poll() is None
        process.stdout.close()
        assert re.fullmatch(r"--seed \d+ writes this again\n", process.stderr.read())
    assert process.returncode == 0
    assert first.startswith(b"7") and 0 < len(first + second) < 1000


def test_last_where_there_is_no_best(call, trained, sampled, tmp_path):
    """A run that was stopped before its first validation."""
    (tmp_path / "last.npz").write_bytes((trained[0] / "last.npz").read_bytes())
    best, last = tmp_path / "best.npz", tmp_path / "last.npz"
    process = call("sample.py", best, "--seed", 0, "--length", 20)
    assert process.stderr == f"there is no {best} yet, so this is {last}\n"
    assert (process.returncode, process.stdout) == (0, sampled("--length", 20, at=last))


# ---- prompts -------------------------------------------------------------------------------------


def test_where_prompts_come_from(sampled, tmp_path):
    (tmp_path / "prompt").write_text("2 times\n")
    none = ["--length", 0]
    assert sampled(*none, "--prompt", f"@{tmp_path / 'prompt'}") == "2 times\n\n"
    assert sampled(*none, "--prompt", "-", stdin="3 is\n4") == "3 is\n4\n"
    assert sampled(*none, "--prompt", r"1\n2", "--escapes") == "1\n2\n"


def test_a_conversation(call, best, odd):
    """Each answer goes on from all before it, which is not printed again."""
    options = ["--interactive", "--length", 9, "--seed", 7, "--prompt", "1 is"]
    process = call("sample.py", best, *options, stdin="2 is\nxyz\n\n")
    assert (process.returncode, process.stderr) == (0, "")
    first, unknown, second, end = process.stdout.split("> ")[1:]
    params, config, extra = load_checkpoint(best)
    text = "1 is2 is"
    for seed, answer in ((7, first), (9, second)):
        drawn = generate(params, config, encode(text, extra["vocab"]), 9, temperature=0.8, seed=seed)
        drawn = decode(drawn, extra["vocab"])
        assert answer == text[4 if seed == 7 else len(text) :] + drawn + "\n"
        text += drawn
    assert "'x' 'y' 'z'" in unknown and end == "\n"


def test_control_characters_are_escaped_on_a_terminal(on_terminal, sampled, odd):
    """A text may hold what clears a screen; into a file it goes as it is."""
    at = odd("\x1b[2J\x07\x9b\n\r\u202e")
    code, shown = on_terminal("sample.py", at, "--length", 200, "--seed", 0, "--prompt", "\x1b[2J")
    assert code == 0 and not {*shown} & {*"\x1b\x07\x9b\u202e"}
    assert shown.startswith(r"\x1b[2J") and {r"\x07", r"\x9b", r"\u202e"} <= {*re.findall(r"\\\w{3}\b|\\x..|\\u....", shown)}
    assert {*"\x1b\x07\x9b\u202e"} <= {*sampled("--length", 200, at=at)}


def test_a_conversation_on_a_terminal(on_terminal, best):
    code, shown = on_terminal("sample.py", best, "--interactive", "--length", 3, keys="2 is\n\x04")
    assert code == 0 and re.search(r"> (2 is\r\n)?2 is.{1,3}\r\n> ", shown, re.DOTALL)


@pytest.mark.parametrize("flags, env", [
    (["-I"], {}), (["-P"], {}), ([], {"PYTHONOPTIMIZE": "2", "LC_ALL": "C"}),
    ([], {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"})])
def test_other_ways_to_start_python(odd, flags, env):
    """-I and -P leave the program's folder out of its path; a prompt is UTF-8 in any locale."""
    if "-P" in flags and sys.version_info < (3, 11):
        pytest.skip("this Python has no -P")
    command = [sys.executable, *flags, ROOT / "sample.py", odd("你好"), "--length", "5"]
    done = subprocess.run([*command, "--prompt", "你好".encode()], capture_output=True, env=os.environ | env)
    assert done.returncode == 0 and done.stdout.startswith("你好".encode()), done


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, message", [
    ("--length -1", "--length: -1 is not between 0"), ("--temperature nan", "--temperature"),
    ("--top-k 0", "--top-k"), ("--samples 0", "--samples"), (f"--seed {2**63}", "--seed"),
    ("--prompt -x", "(one that begins with a dash is written --option=-value)"), ("--wild", "--wild"),
    ("--precision tf32", "--gpu"), ("--prompt Ω你", "not in the model's vocabulary: 'Ω' '你'"),
    ("--prompt 12\udcff", r"'\udcff'"), ("--prompt=\x1b", r"'\x1b'"),
    ("--prompt @nowhere", "cannot read nowhere: No such file"), ("two\nlines", "two lines does not exist"),
    ("--interactive --prompt é", "'é'")])
def test_bad_options(call, refused, best, flags, message):
    words = flags.split(" ")
    process = call("sample.py", *([] if words[0] == "two\nlines" else [best]), *words)
    assert message in refused(process) and process.stdout == ""


def test_bytes_that_are_not_text(program, refused, best):
    assert r"'\udcff'" in refused(program("sample.py", best, "--prompt", b"12\xff"))


@pytest.mark.skipif(os.name != "posix", reason="closed by a POSIX shell")
def test_closed_streams(best):
    for streams in ("<&- --prompt -", "<&- --interactive", ">&-", "2>&-"):
        command = f"{sys.executable} {ROOT / 'sample.py'} {best} --length 5 --seed 0 {streams}"
        process = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_the_output(program, refused, best):
    with open("/dev/full", "w") as full:
        sentence = refused(program("sample.py", best, "--seed", 0, stdout=full))
    assert sentence == "sample.py: standard output: No space left on device\n"


def test_weights_that_overflow(call, refused, odd):
    """Finite weights of a model that has diverged, whose logits are not finite."""
    params, config, extra = load_checkpoint(path := odd("abcde"))
    huge = {name: np.full_like(value, 1e37) for name, value in params.items()}
    save_checkpoint(path, huge, config, **extra)
    assert "not finite" in refused(call("sample.py", path, "--seed", 0))


@pytest.mark.parametrize("extra", [
    {}, {"vocab": [*range(5)]}, {"vocab": [*range(5)], "most_common": 5},
    {"vocab": [*range(5)], "most_common": 1.0}, {"vocab": [*range(5)], "most_common": "a"}])
def test_checkpoints_that_are_not_of_training(call, refused, tmp_path, extra):
    config = Config(5, context=4, n_layer=1, d_model=4, rank=2)
    save_checkpoint(tmp_path / "it.npz", init_params(config), config, **extra)
    assert "was not written by train_char.py" in refused(call("sample.py", tmp_path / "it.npz"))
