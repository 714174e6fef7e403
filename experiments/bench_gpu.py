"""What gpu.py does on a CUDA card, against PyTorch and against what the card could do.

  python -m experiments.bench --gpu --report        everything in nine minutes, results/gpu-CARD.md
  python -m experiments.bench --gpu --only floor    what a step starts and moves: needs no card
  python -m experiments.bench --gpu --only best     README's best model: when it reaches 1.47 nats
  python -m experiments.bench --gpu --rehearse      tiny, on the tests' stand-in: the layout

Needs a card and CuPy, and a PyTorch built for CUDA to compare with, or there is no comparison. Each
section is a process of its own: one contestant is in memory at a time, and what fails or lasts too
long ends its section only. A row is printed, and written, when it is measured. Both sides have the
same precision, batches, clipping and AdamW; the text lies on the card, and the clock is read when
the card is done. What is compiled is so with its loss, which takes a minute or more.
"""

import cli  # noqa: I001  (before NumPy)

import contextlib
import csv
import functools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

import grassmann
from experiments.bench_models import (Ours, Setup, Tensor, Theirs, cell, multiply_adds,
                                      n_parameters, torch)
from grassmann import Config
from text import read_corpus
from training import Training, train_step

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 530  # for all sections of a report
DEVICE = "cuda"  # PyTorch's; gpu.py has CuPy's
LARGE = 8192  # rows of a product, and of a copy, that show the card's rates
MODES = {"pytorch": None, "compiled": "reduce-overhead", "autotuned": "max-autotune"}
SIZES = {  # of the models, and the batch; the second is nanoGPT's for a GPU
    "laptop": ({"n_layer": 4, "d_model": 128, "n_head": 4, "context": 64}, 12),
    "nanogpt": ({"n_layer": 6, "d_model": 384, "n_head": 6, "context": 256}, 64),
}
RATES = {"GB/s": 3350.0, "TFLOP/s": 50.0, "TFLOP/s in tf32": 400.0, "us a node": 1.5}  # an H100's
GOAL = 1.47  # nats: nanoGPT's in windows of 256, here in the model's own

# ---- sections: each yields the rows of its table; what it prints besides are notes ---------------

def card(setup: Setup) -> Iterator[dict]:
    """The card, and at what rates it copies, multiplies and starts the nodes of a graph"""
    gpu, precisions = precisions_of_card()
    cp, device = gpu.cp, gpu.cp.cuda.Device()
    row = {"card": "a stand-in", "CuPy": getattr(cp, "__version__", ""),
           "capability": device.compute_capability}
    if hasattr(cp.cuda.runtime, "getDeviceProperties"):
        row["card"] = cp.cuda.runtime.getDeviceProperties(device.id)["name"].decode()
        row |= {"the driver's CUDA": cp.cuda.runtime.driverGetVersion(),
                "CUDA": cp.cuda.runtime.runtimeGetVersion()}
    row["PyTorch"] = torch.__version__ if on_card() else "none with CUDA"
    a, b = (cp.ones((LARGE, 16384), np.float32) for _ in "ab")  # larger than any cache
    row["GB/s"] = 2e-9 * a.nbytes / timed(lambda: cp.copyto(b, a), finish(gpu))
    a, b, c = (cp.ones((LARGE, LARGE), np.float32) for _ in "abc")
    for precision in precisions:
        gpu.set_precision(precision)
        rate = 2e-12 * LARGE**3 / timed(lambda: gpu.product(a, b, c), finish(gpu))
        row["TFLOP/s" if precision == "float32" else "TFLOP/s in tf32"] = rate
    few = cp.ones(32, np.float32)
    graph = gpu.card.Graph(lambda x: [few.__iadd__(x) for _ in range(200)], [few])
    row["us a node"] = 1e6 / 200 * timed(lambda: graph(few), finish(gpu))
    yield row

def floor(setup: Setup, rates: dict) -> Iterator[dict]:
    """What a step of the default model starts and moves, and how long that must take

    Counted on the tests' stand-in for CuPy: the graph's nodes, the launches and copies around them,
    the bytes of their arguments, multiply-adds of products twice. The floor: each node at the
    card's rates, its bytes, its operations or its start, whichever takes longest.
    """
    sys.path.insert(0, str(ROOT / "tests" / "gpu"))
    import cuda_on_cpu

    gpu, cuda_on_cpu.dry = cuda_on_cpu.gpu_on_cpu(), True
    np.seterr(all="ignore")  # nothing is computed
    for size, (sizes, batch_size) in SIZES.items():
        for dropout in (0.0, 0.1):
            config = replace(setup, sizes=sizes).config(dropout=dropout)
            params, text = gpu.init_params(config), gpu.np.zeros(10_000, dtype=np.uint8)
            state = gpu.adamw_init(params)
            for step in range(3):  # the last: as all that follow
                cuda_on_cpu.started.clear()
                batch = gpu.get_batch(text, batch_size, config.context, 0, step)
                train_step(gpu, params, config, Training(), state, step, *batch, threads=0)
            around = [node[:3] for node in cuda_on_cpu.started if node[0] != "graph"]
            nodes = [node[:3] for node in params.graph.graph.nodes]
            stream = gpu.stream_init(params, config)
            for _ in range(config.context):  # as far as the offsets reach
                cuda_on_cpu.started.clear()
                gpu.stream_step(params, config, stream, 0)
            row = {"size": size, "dropout": dropout, "nodes": len(nodes),
                   "launches": 1 + len(around), "products": sum(name == "product" for name, *_ in nodes),
                   "MB": 1e-6 * sum(moved for _, moved, _ in nodes + around),
                   "MB of products": 1e-6 * sum(n[1] for n in nodes if n[0] == "product"),
                   "GFLOP": 2e-9 * sum(work for *_, work in nodes),
                   "launches a character": len(cuda_on_cpu.started)}
            for name in {"TFLOP/s", "TFLOP/s in tf32"} & rates.keys():
                seconds = [max(1e-9 * moved / rates["GB/s"], 2e-12 * work / rates[name],
                               1e-6 * rates["us a node"]) for _, moved, work in nodes + around]
                row["floor, ms" + name.removeprefix("TFLOP/s")] = 1e3 * sum(seconds)
            yield row

def tests(setup: Setup) -> Iterator[dict]:
    """Parity with NumPy, op by op: pytest -m gpu"""
    which = ["-m", "gpu"] if DEVICE == "cuda" else ["-k", "test_op and linear"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", *which]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    *lines, last = run.stdout.splitlines() or [""]
    print(*[line for line in lines if line.startswith(("FAILED", "ERROR"))], sep="\n")
    yield {"tests": last.strip("= ")}

def ours(setup: Setup, size: str) -> Iterator[dict]:
    """Milliseconds per training step of gpu.py, as a graph and kernel by kernel"""
    gpu, precisions = precisions_of_card()
    setup = of_size(setup, size)
    for precision in precisions:
        gpu.set_precision(precision)
        for name, config in models(setup).items():
            if name != "GPT":
                run = Ours(setup, config, gpu)
                run.step()
                for by, graph in (("gpu.py, graph", None), ("gpu.py, kernels", False)):
                    run.params.sources, run.params.graph = None, graph  # (None: the next step records)
                    yield step_row(size, precision, name, by, config, timed(run.step, finish(gpu)))
                run = None

def theirs(setup: Setup, size: str, by: str) -> Iterator[dict]:
    """Milliseconds per training step of PyTorch, eager or compiled

    The default model and the GPT; eager also the paper's layer in its usual code.
    """
    if not on_card():
        print("no PyTorch here finds a CUDA GPU")
        return
    setup, (_, precisions) = of_size(setup, size), precisions_of_card()
    for precision in precisions[-1:] if MODES[by] else precisions:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        for name, config in models(setup).items():
            if name != "paper's layer" or not MODES[by]:
                try:
                    run = OnCard(setup, config, MODES[by])
                    row = step_row(size, precision, name, by, config, timed(run.step, finish(None)))
                except Exception as error:  # in many ways, and the table does without it
                    print(f"{name}, {by}: {type(error).__name__}: {str(error)[:300]}")
                    continue
                finally:
                    run = None
                yield row

def kernels(setup: Setup, size: str, steps: int = 10) -> Iterator[dict]:
    """Where the time of a step goes, kernel by kernel (CUPTI, through PyTorch's profiler)"""
    gpu, precisions = precisions_of_card()
    gpu.set_precision(precisions[-1])
    run = Ours(of_size(setup, size), of_size(setup, size).config(), gpu)
    timed(run.step, finish(gpu))
    if not on_card():
        print("no PyTorch here finds a CUDA GPU")
        return
    activity = getattr(torch.profiler.ProfilerActivity, DEVICE.upper())
    with torch.profiler.profile(activities=[activity]) as profile:
        for _ in range(steps):
            run.step()
        finish(gpu)()
    spent, calls = Counter(), Counter()
    for event in profile.events():
        if DEVICE == "cpu" or event.device_type == torch.autograd.DeviceType.CUDA:
            spent[event.name] += event.time_range.elapsed_us()
            calls[event.name] += 1
    for name, us in spent.most_common(40):
        yield {"kernel": name[:60], "size": size, "a step": calls[name] / steps,
               "us a step": us / steps, "share": us / spent.total()}

def generation(setup: Setup, characters: int = 200) -> Iterator[dict]:
    """Characters written per second by NumPy on one thread and by the card, at both sizes"""
    gpu, _ = precisions_of_card()
    for size in SIZES:
        config = of_size(setup, size).config()
        params = gpu.init_params(config)
        on_host = {name: a.get() for name, a in params.items()}
        row = {"size": size, "parameters": n_parameters(config)}
        for by, write in (("NumPy", functools.partial(grassmann.generate, on_host)),
                          ("the card", functools.partial(gpu._generate, params))):
            list(write(config, [0], 5))
            start = time.perf_counter()
            list(write(config, [0], characters))
            row[by] = characters / (time.perf_counter() - start)
        by = "NumPy" if params.buffer.size <= gpu.ON_HOST else "the card"
        yield row | {"by gpu.generate": by}

def training(setup: Setup, steps: int = 300) -> Iterator[dict]:
    """The first steps of a training run on the card and by NumPy: their losses, every 50th"""
    gpu, _ = precisions_of_card()
    config, losses = setup.config(), {}
    for by, model in (("the card", gpu), ("NumPy", grassmann)):
        params = model.init_params(config)
        state, text = model.adamw_init(params), model.np.asarray(setup.corpus.train)
        start, found = time.perf_counter(), []
        for k in range(steps):
            x, y = model.get_batch(text, setup.training.batch_size, config.context, 0, k)
            threads = setup.threads if model is grassmann else 0
            found.append(train_step(model, params, config, setup.training, state, k, x, y, threads))
        losses[by] = [float(loss) for loss in found]
        print(f"{by}: {steps} steps in {time.perf_counter() - start:.1f} s")
    for k in sorted({*range(0, steps, 50), steps - 1}):
        yield {"step": k} | {by: found[k] for by, found in losses.items()} | {
            "largest difference so far": max(abs(a - b) for a, b in zip(
                losses["the card"][: k + 1], losses["NumPy"][: k + 1], strict=True))}

def best(setup: Setup) -> Iterator[dict]:
    """README's best model, trained on the card: when it reaches 1.47 nats, and its best loss"""
    _, precisions = precisions_of_card()
    out = Path(tempfile.mkdtemp())
    command = [sys.executable, str(ROOT / "train_char.py"), "--data", "shakespeare", "--preset",
               "best", "--gpu", "--precision", precisions[-1], "--out", str(out)]
    if DEVICE == "cpu":
        command += ["--preset", "tiny", "--iters", "4", "--eval-every", "2", "--d-model", "8",
                    "--rank", "3", "--context", "8", "--data", str(ROOT / "tutorial.md")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with (out / "log.csv").open() as log:
        rows = [row for row in csv.DictReader(log) if row["val_loss"]]
    reached = [row for row in rows if float(row["val_loss"]) <= GOAL]
    for what, row in ((f"first of {GOAL} or less", reached[0] if reached else None),
                      ("best", min(rows, key=lambda row: float(row["val_loss"])))):
        if row:
            yield {"what": what, "step": int(row["step"]), "nats": float(row["val_loss"]),
                   "seconds": float(row["seconds"])}

SECTIONS = {"card": (card, 60), "floor": (floor, 60), "tests": (tests, 150)}  # and at most how long
for _size in SIZES:
    SECTIONS[f"{_size}-ours"] = functools.partial(ours, size=_size), 60
for _size in SIZES:
    SECTIONS[f"{_size}-kernels"] = functools.partial(kernels, size=_size), 45
SECTIONS |= {"generation": (generation, 30), "training": (training, 60)}
for _by in MODES:
    for _size in reversed(SIZES):
        SECTIONS[f"{_size}-{_by}"] = functools.partial(theirs, size=_size, by=_by), 150
SECTIONS["best"] = best, 3600

# ---- what they share -----------------------------------------------------------------------------

def precisions_of_card() -> tuple:
    """gpu.py, in float32, and in which precisions this card multiplies."""
    gpu, precisions = cli.backend(True), ["float32"]
    try:
        gpu.set_precision("tf32")
        precisions.append("tf32")
    except ValueError as error:
        print(error)
    gpu.set_precision("float32")
    return gpu, precisions

def on_card() -> bool:
    return torch is not None and (DEVICE == "cpu" or torch.cuda.is_available())

def finish(gpu: object) -> functools.partial:
    """Waits for the card, of gpu.py or of PyTorch."""
    if gpu is not None:
        return gpu.cp.cuda.Device().synchronize
    return torch.cuda.synchronize if DEVICE == "cuda" else int

def timed(step: functools.partial, finish: functools.partial, rounds: int = 7) -> float:
    """Seconds of a call, the median of some rounds of calls, after some that are not timed."""
    for _ in range(3):  # kernels are compiled, a graph is recorded
        step()
    finish()
    times, calls = [], 1
    for k in range(rounds + 1):
        start = time.perf_counter()
        for _ in range(calls):
            step()
        finish()
        times.append((time.perf_counter() - start) / calls)
        if DEVICE == "cpu":  # a rehearsal
            break
        calls = max(1, min(200, round(0.3 / times[0]))) if k == 0 else calls
    return median(times[1:] or times)

def of_size(setup: Setup, size: str) -> Setup:
    sizes, batch_size = SIZES[size]
    return replace(setup, sizes=sizes, training=replace(setup.training, batch_size=batch_size))

def models(setup: Setup) -> dict[str, Config]:
    return {"default": setup.config(), "GPT": setup.gpt_config(),
            "paper's layer": setup.config(taps=False, normalize=True, positions=True)}

def step_row(
    size: str, precision: str, model: str, by: str, config: Config, seconds: float
) -> dict:
    work = 2e-12 * multiply_adds(config, SIZES[size][1])
    return {"size": size, "precision": precision, "model": model, "by": by,
            "parameters": n_parameters(config), "ms": 1e3 * seconds, "TFLOP/s": work / seconds}

class OnCard(Theirs):
    """A PyTorch model in training on the card, compiled if a mode is given."""

    def __init__(self, setup: Setup, config: Config, mode: str | None):
        super().__init__(setup, config, DEVICE)
        self.tokens = self.tensor(setup.corpus.train)
        self.window = torch.arange(config.context, device=DEVICE)
        if mode:
            self.loss = torch.compile(self.loss, mode=mode, fullgraph=True, dynamic=False)

    def batch(self) -> tuple[Tensor, Tensor]:
        """As `gpu.get_batch`: places are drawn on the host, they alone travel, nobody waits."""
        t, end = self.setup.training, len(self.tokens) - len(self.window)
        starts = np.random.default_rng((t.seed, self.k)).integers(0, end, t.batch_size)
        windows = torch.from_numpy(starts).to(DEVICE, non_blocking=True)[:, None] + self.window
        return self.tokens[windows], self.tokens[windows + 1]

# ---- the report ----------------------------------------------------------------------------------

class Report:
    """The sections that were run: their rows and notes, as Markdown and JSON if there is a folder;
    what other sections say there already stays, if asked to."""

    def __init__(self, folder: Path | None, title: str, keep: bool = False):
        self.folder, self.title, self.keep = folder, title, keep
        self.sections, self.started = {}, time.perf_counter()

    def ratios(self, row: dict) -> dict:
        """A time beside that of our graph, and beside the floor."""
        def ms(section: str, column: str, **of) -> float:
            return next((other[column] for other in self.sections.get(section, {"rows": []})["rows"]
                         if column in other and all(other[key] == of[key] for key in of)), math.nan)

        if "precision" not in row:
            return row
        model = "default" if row["model"] == "GPT" else row["model"]
        graph = row["ms"] if row["by"] == "gpu.py, graph" else ms(
            f"{row['size']}-ours", "ms", precision=row["precision"], model=model,
            by="gpu.py, graph")
        column = "floor, ms" + " in tf32" * (row["precision"] == "tf32")
        least = ms("floor", column, size=row["size"], dropout=0.0)
        return row | {"x our graph": row["ms"] / graph,
                      "x floor": row["ms"] / least if row["model"] == "default" else math.nan}

    def run(self, name: str, data: str | None, rehearse: bool, limit: float) -> None:
        """A section, in a process that has so many seconds; prints and writes its rows."""
        function, own_limit = SECTIONS[name]
        section = self.sections[name] = {"rows": [], "notes": []}
        what = getattr(function, "func", function).__doc__.splitlines()[0]
        print(f"\n{name}: {what}\n", flush=True)
        if limit < 5:
            section["notes"].append("no time was left")
            print(section["notes"][0])
            return self.write()
        found = [row for row in self.sections.get("card", section)["rows"] if "GB/s" in row]
        rates = {key: found[0][key] for key in RATES if key in found[0]} if found else RATES
        environment, asked = dict(os.environ), json.dumps([data, rates, rehearse])
        command = [sys.executable, "-m", "experiments.bench_gpu", name, asked]
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
            if rehearse:
                stand_in = "import cuda_on_cpu, sys; sys.modules['cupy'] = cuda_on_cpu"
                (Path(folder) / "cupy.py").write_text(stand_in)
                environment["PYTHONPATH"] = os.pathsep.join([folder, str(ROOT / "tests" / "gpu")])
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True,
                encoding="utf-8", start_new_session=True)

            def end() -> None:
                """With all that it has started, as torch.compile its workers."""
                with contextlib.suppress(ProcessLookupError):
                    if hasattr(os, "killpg"):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.kill()

            timer = threading.Timer(min(own_limit, limit), end)
            timer.start()
            try:
                for line in process.stdout:
                    if line.startswith("{"):
                        section["rows"].append(self.ratios(json.loads(line)))
                        if len(section["rows"]) == 1:
                            print(*section["rows"][0], sep=" | ")
                        print(*map(cell, section["rows"][-1].values()), sep=" | ", flush=True)
                    elif line.strip():
                        section["notes"].append(line.strip())
                        print(line.rstrip(), flush=True)
                    self.write()
                if code := process.wait():
                    errors.seek(0)
                    last = "it took too long" if code == -9 else (errors.read().strip().splitlines() or ["it ended"])[-1]
                    section["notes"].append(last[:500])
                    print(f"{name} ended early: {last[:500]}")
            finally:
                timer.cancel()
                end()
                process.wait()
        self.write()

    def write(self) -> None:
        """Everything so far; the file is named after the card."""
        if self.folder is None or not any(section["rows"] for section in self.sections.values()):
            return
        rows = self.sections.get("card", {"rows": []})["rows"]
        name = "".join(c if c.isalnum() else "-" for c in rows[0]["card"]) if rows else "unknown"
        data = self.folder / f"gpu-{name}.json"
        if self.keep and data.exists():
            self.sections = json.loads(data.read_text(encoding="utf-8")) | self.sections
        self.keep = False
        command, seconds = " ".join(sys.argv[1:]), time.perf_counter() - self.started
        lines = [f"# {self.title}", "", f"Last written by `python -m experiments.bench {command}`, "
                 f"{seconds:.0f} seconds in all."]
        for key, section in self.sections.items():
            function = SECTIONS[key][0]
            lines += ["", f"## {key}", "", getattr(function, "func", function).__doc__.strip(), ""]
            columns = list(dict.fromkeys(column for row in section["rows"] for column in row))
            if columns:
                lines += ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
                lines += ["| " + " | ".join(cell(row.get(c, "")) for c in columns) + " |"
                          for row in section["rows"]]
            lines += [f"\n{note}" for note in section["notes"]]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"gpu-{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        data.write_text(json.dumps(self.sections, indent=1), encoding="utf-8")

def main(only: list[str] | None, data: str | None, folder: Path | None, rehearse: bool) -> None:
    """Run sections, all but the long one unless given. Raises ValueError if there is no card."""
    names = only or [name for name in SECTIONS if name != "best"]
    if names != ["floor"] and "card" not in names:
        names = ["card", *names]
    report = Report(folder, "A rehearsal" if rehearse else "On a card", keep=only is not None)
    for name in names:
        left = SECONDS - (time.perf_counter() - report.started)
        report.run(name, data, rehearse, math.inf if only or rehearse else left)
        if name == "card" and not report.sections["card"]["rows"]:
            raise ValueError(report.sections["card"]["notes"][-1])

def section(name: str, data: str | None, rates: dict, rehearse: bool) -> None:
    """What a process of a report does."""
    global DEVICE, LARGE
    if rehearse:
        DEVICE, LARGE = "cpu", 64
        tiny = {"n_layer": 2, "d_model": 16, "rank": 4, "context": 24, "n_head": 4}
        SIZES.update(dict.fromkeys(SIZES, (tiny, 2)))
    setup = Setup(read_corpus(data, 16_384), len(cli.available_cores()))
    function, more = SECTIONS[name][0], {"rates": rates} if name == "floor" else {}
    if rehearse:
        setup = replace(setup, sizes=SIZES["laptop"][0])
        more |= {"training": {"steps": 5}, "generation": {"characters": 5}}.get(name, {})
    for row in function(setup, **more):
        print(json.dumps(row), flush=True)

if __name__ == "__main__":
    try:
        section(sys.argv[1], *json.loads(sys.argv[2]))
    except ValueError as error:  # no card
        sys.exit(str(error))
