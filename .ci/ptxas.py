"""What the compilers make of kernels.cu, for the GPUs of eight years: python .ci/ptxas.py

For each kernel, type and architecture: registers, bytes of shared memory, bytes spilled (ptxas -v);
and in its PTX the loads through the read-only cache, the loads of several numbers at once, and the
atomics. Ends with 1 if a kernel spills, needs more than 48 KB of shared memory, has an atomic or a
wide load, or reads through the read-only cache what it may have written itself. Needs no GPU, but
CuPy, nvidia-cuda-nvrtc and nvidia-cuda-nvcc.
"""

import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from cupy.cuda import nvrtc

ARCHITECTURES = 75, 80, 86, 89, 90, 100, 120
SOURCE = (Path(__file__).parents[1] / "gpu_kernels" / "kernels.cu").read_text(encoding="utf-8")
ENTRY = re.compile(r"\.entry (\w+)\(.*?\n\{(.*?)\n\}", re.DOTALL)
INSTRUCTION = re.compile(r"(?:@!?%p\d+ )?([\w.]+)\s+(.*);")


def ptxas() -> str:
    """The assembler in NVIDIA's package of compilers."""
    folders = importlib.util.find_spec("nvidia").submodule_search_locations
    return str(
        next(path for folder in folders for path in Path(folder).rglob("ptxas*") if path.is_file())
    )


def compiled(real: str, arch: int) -> str:
    """kernels.cu in PTX."""
    code = SOURCE.encode("ascii", "backslashreplace").decode()
    program = nvrtc.createProgram(code, "kernels.cu", (), ())
    options = f"-Dreal={real}", f"-arch=compute_{arch}", "-std=c++17", "-ftz=true"
    nvrtc.compileProgram(program, options)
    return nvrtc.getPTX(program).decode()


def origins(body: list[tuple[str, str]]) -> dict[str, set[str]]:
    """Register -> the kernel's pointers from which its address may have been computed."""
    found: dict[str, set[str]] = {}
    before = None
    while before != (before := sum(map(len, found.values()))):  # until nothing is new
        for operation, operands in body:
            register, _, rest = operands.partition(",")
            if operation in ("ld.param.u64", "ld.param.b64"):  # a pointer
                new = set(re.findall(r"_param_(\d+)", rest))
            elif operation.startswith(("ld.", "st.")):
                continue  # what is loaded is a number, not an address
            else:
                used = re.findall(r"%\w+", rest)
                new = set().union(*(found.get(name, set()) for name in used))
            found.setdefault(register, set()).update(new)
    return found


def hazards(text: str) -> dict[str, tuple[int, int, int, set[str]]]:
    """Kernel -> read-only loads, wide loads, atomics, and parameters both stored and so loaded."""
    kernels = {}
    for name, code in ENTRY.findall(text):
        body = [INSTRUCTION.match(line.strip()) for line in code.splitlines()]
        body = [match.groups() for match in body if match]
        found = origins(body)
        through_cache, stored = [], []
        for operation, operands in body:
            address = re.search(r"\[(%\w+)", operands)
            if operation.startswith("ld.global.nc"):
                through_cache.append(found.get(address[1], set()))
            elif operation.startswith("st.global"):
                stored.append(found.get(address[1], set()))
        wide = sum(".v2" in operation or ".v4" in operation for operation, _ in body)
        atomics = sum(operation.startswith(("atom", "red.")) for operation, _ in body)
        both = set().union(*through_cache) & set().union(*stored)
        kernels[name] = len(through_cache), wide, atomics, both
    return kernels


def assembled(text: str, arch: int) -> dict[str, tuple[int, int, int]]:
    """Name of each kernel -> registers of a thread, bytes of shared memory, bytes spilled."""
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "kernels.ptx"
        code.write_text(text)
        command = [ptxas(), "-v", f"-arch=sm_{arch}", code, "-o", code.with_suffix(".cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    kernels = {}
    for name, report in re.findall(
        r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", said, re.DOTALL
    ):
        numbers = (
            re.search(rf"(\d+) {what}", report)
            for what in ("registers", "bytes smem", "bytes spill stores")
        )
        kernels[name] = tuple(int(found[1]) if found else 0 for found in numbers)
    return kernels


def main() -> int:
    wrong = []
    for real in ("float", "double"):
        texts = {arch: compiled(real, arch) for arch in ARCHITECTURES}
        risks = {arch: hazards(text) for arch, text in texts.items()}
        found = {arch: assembled(text, arch) for arch, text in texts.items()}
        print(f"{real}: registers, shared bytes, spilled bytes; read-only, wide loads, atomics")
        print(" " * 20, *(f"sm_{arch}".rjust(20) for arch in ARCHITECTURES))
        for name in found[ARCHITECTURES[0]]:
            cells = []
            for arch in ARCHITECTURES:
                registers, shared, spilled = found[arch][name]
                loads, wide, atomics, both = risks[arch][name]
                cells.append(f"{registers:3},{shared:5},{spilled};{loads:4},{wide},{atomics}")
                if spilled or shared > 48 * 1024 or wide or atomics or both:
                    wrong.append(f"{name} in {real} on sm_{arch}; read-only but stored: {both}")
            print(name.rjust(20), *(cell.rjust(20) for cell in cells))
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
