"""Builds ext/*.pyx into overlaykit/_ext/. The only place with compiler directives; all else is in pyproject.toml.

OVERLAYKIT_DEBUG=1  bounds, initialisation and line tracing checked, -O0
OVERLAYKIT_ASAN=1   the kernels under AddressSanitizer and UBSan (run with LD_PRELOAD=libasan.so)
OVERLAYKIT_FUZZ=1   under AddressSanitizer and with libFuzzer's coverage, by clang (tests/fuzz_tar.py says how)
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("OVERLAYKIT_DEBUG", "") not in ("", "0")
ASAN = os.environ.get("OVERLAYKIT_ASAN", "") not in ("", "0")
FUZZ = os.environ.get("OVERLAYKIT_FUZZ", "") not in ("", "0")

directives = {
    "language_level": 3,
    "boundscheck": DEBUG,
    "initializedcheck": DEBUG,
    "wraparound": False,
    "cdivision": True,
    "embedsignature": True,
    "autotestdict": False,
    "freethreading_compatible": True,
}
compile_args = ["-std=c11", "-O0", "-g"] if DEBUG else ["-std=c11", "-O3"]
# char may be unsigned (arm64), and off_t must have 64 bits everywhere.
compile_args += ["-fsigned-char", "-D_FILE_OFFSET_BITS=64", "-D_GNU_SOURCE"]
link_args: list[str] = []
if ASAN:
    compile_args += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]
    link_args += ["-fsanitize=address,undefined"]
if FUZZ:
    compile_args += ["-fsanitize=address,fuzzer-no-link", "-fno-omit-frame-pointer", "-g"]
    link_args += ["-fsanitize=address,fuzzer-no-link"]

headers = [str(p) for p in sorted(Path("ext").glob("*.pxd"))]
kernels = [
    Extension(
        f"overlaykit._ext.{source.stem}",
        [str(source)],
        depends=[str(source), *headers],  # the kernel itself too: an sdist takes what is listed here
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )
    for source in sorted(Path("ext").glob("*.pyx"))
]
setup(
    ext_modules=cythonize(
        kernels,
        include_path=["ext"],
        # One folder for each kind of build: switching between them must never reuse the other's C.
        build_dir="build/cython-" + ("debug" if DEBUG else "release"),
        compiler_directives=directives,
        nthreads=os.cpu_count() or 1,
    ),
    options={"build_ext": {"parallel": os.cpu_count()}},
)
