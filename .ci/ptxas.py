"""What ptxas makes of kernels.cu, for the GPUs of eight years: python .ci/ptxas.py

Prints registers, shared memory and spilled bytes of every kernel; ends with 1 if one spills. Needs
no GPU, but CuPy, nvidia-cuda-nvrtc and nvidia-cuda-nvcc.
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


def ptxas() -> str:
    """The assembler in NVIDIA's package of compilers."""
    folders = importlib.util.find_spec("nvidia").submodule_search_locations
    return str(
        next(path for folder in folders for path in Path(folder).rglob("ptxas*") if path.is_file())
    )


def assembled(real: str, arch: int) -> dict[str, tuple[int, int, int]]:
    """Name of each kernel -> registers of a thread, bytes of shared memory, bytes spilled."""
    program = nvrtc.createProgram(
        SOURCE.encode("ascii", "backslashreplace").decode(), "kernels.cu", (), ()
    )
    nvrtc.compileProgram(
        program, (f"-Dreal={real}", f"-arch=compute_{arch}", "-std=c++17", "-ftz=true")
    )
    with tempfile.TemporaryDirectory() as folder:
        (code := Path(folder) / "kernels.ptx").write_bytes(nvrtc.getPTX(program))
        command = [
            ptxas(),
            "-v",
            f"-arch=sm_{arch}",
            str(code),
            "-o",
            str(Path(folder) / "kernels.cubin"),
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    kernels = {}
    for name, text in re.findall(
        r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", said, re.DOTALL
    ):
        numbers = (
            re.search(rf"(\d+) {what}", text)
            for what in ("registers", "bytes smem", "bytes spill stores")
        )
        kernels[name] = tuple(int(found[1]) if found else 0 for found in numbers)
    return kernels


if __name__ == "__main__":
    spilled = 0
    for real in ("float", "double"):
        found = {arch: assembled(real, arch) for arch in ARCHITECTURES}
        print(
            f"{real}: registers, shared bytes, spilled bytes",
            *(f"sm_{arch}".rjust(11) for arch in ARCHITECTURES),
        )
        for name in found[ARCHITECTURES[0]]:
            print(
                name.rjust(41 + (real == "double")),
                *("{:3},{:5},{:2}".format(*found[arch][name]) for arch in ARCHITECTURES),
            )
            spilled += sum(found[arch][name][2] for arch in ARCHITECTURES)
    sys.exit(f"{spilled} bytes are spilled" if spilled else 0)
