"""Compile the kernels beside this file into one library, where a C compiler is.

    python -m kizzasi.models.ops.native.build [COMPILER]

Needs nothing but Python, so that an install can run it before anything else is there. The library
is named after all that it was made of: one that is older than the sources is not found, which is
as good as none.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
# instruction set: bytes of a vector (0: one number), flags. Later ones are preferred.
X86 = {
    "scalar": (0, []),
    "avx2": (32, ["-mavx2", "-mfma"]),
    "avx512": (64, ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]),
}
ARM = {"scalar": (0, []), "neon": (16, [])}
REALS = {"f32": ("float", 32), "f64": ("double", 64)}
FLAGS = ["-std=gnu11", "-O3", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", "-pthread"]


def instruction_sets() -> dict[str, tuple[int, list[str]]]:
    """What this kind of machine may have; which of them it has is asked when the library loads."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return X86
    return ARM if machine in ("aarch64", "arm64") else {"scalar": (0, [])}


def library_path(folder: Path = HERE) -> Path:
    """Where the library of these sources is, or would be."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.[ch]"), folder / "build.py"]):
        digest.update(path.read_bytes())
    return folder / f"kernels-{digest.hexdigest()[:16]}.so"


def compiler(wanted: str = "") -> list[str] | None:
    """The one wanted, the one that Python was made with, or any by a usual name; None if none is
    there."""
    usual = shlex.split(sysconfig.get_config_var("CC") or "")[:1]
    names = [shlex.split(wanted), usual, ["cc"], ["gcc"], ["clang"]]
    return next((name for name in names if name and shutil.which(name[0])), None)


def commands(cc: list[str], source: Path, to: Path) -> Iterator[list[str]]:
    """How a source becomes objects, one for each dtype and instruction set; threads.c is one."""
    if source.stem == "threads":
        yield [*cc, *FLAGS, "-c", str(source), "-o", str(to / "threads.o")]
        return
    for isa, (width, flags) in instruction_sets().items():
        for name, (real, bits) in REALS.items():
            lanes = max(1, width * 8 // bits)
            macros = {"REAL": real, "BITS": bits, "LANES": lanes, "SUFFIX": f"{name}_{isa}"}
            given = [f"-D{key}={value}" for key, value in macros.items()]
            out = to / f"{source.stem}_{name}_{isa}.o"
            yield [*cc, *FLAGS, *flags, *given, "-c", str(source), "-o", str(out)]


def build(folder: Path = HERE, wanted: str = "") -> Path:
    """Compile what is in `folder`, with the compiler that is wanted; older libraries there go.

    Raises:
        OSError, subprocess.CalledProcessError: there is no compiler, or it fails; what it says is
            in the error.
    """
    target = library_path(folder)
    if target.exists():
        return target
    cc = compiler(wanted)
    if cc is None:
        raise FileNotFoundError("no C compiler: install gcc or clang")
    with tempfile.TemporaryDirectory() as scratch:
        to = Path(scratch)
        jobs = [c for source in sorted(folder.glob("*.c")) for c in commands(cc, source, to)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, jobs))
        objects = [str(path) for path in sorted(to.glob("*.o"))]
        made = to / target.name
        _run([*cc, "-shared", "-pthread", *objects, "-o", str(made), "-lm"])
        beside = target.with_suffix(f".{os.getpid()}")
        shutil.copy(made, beside)
    os.replace(beside, target)  # whole or not at all, whoever else builds
    for old in folder.glob("kernels-*.so"):
        if old != target:
            old.unlink(missing_ok=True)
    return target


def attempt(folder: Path = HERE, wanted: str = "") -> str:
    """`build` for an install, which must not fail for want of it; what came of it, in words."""
    try:
        return f"kernels: {build(folder, wanted)}"
    except subprocess.CalledProcessError as error:
        said = f"{shlex.join(error.cmd)}\n{error.stderr}"
    except OSError as error:
        said = str(error)
    return f"kernels: not built, torch does without: {said}"


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


if __name__ == "__main__":
    outcome = attempt(wanted=" ".join(sys.argv[1:]))
    sys.exit(None if library_path().exists() else outcome)
