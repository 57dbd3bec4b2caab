"""Build every ``fastref/**/*.pyx`` as an extension; the rest of the metadata is in pyproject.toml.

Environment
-----------
FASTREF_DEBUG : ``1``
    Assertions (``FR_DEBUG``, no ``NDEBUG``), bounds and memoryview checks, symbols, ``-O1``.
FASTREF_SANITIZE : for example ``address,undefined``
    Compile and link with these sanitizers.

Each combination has its own directory under ``build/``, so that switching between them never mixes objects.
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("FASTREF_DEBUG", "0") not in ("", "0")
SANITIZE = os.environ.get("FASTREF_SANITIZE", "")
BUILD_BASE = Path("build") / "-".join(["debug" if DEBUG else "release", *filter(None, SANITIZE.split(","))])

WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-sign-compare"]
OPTIMIZATION = ["-O1", "-g", "-UNDEBUG"] if DEBUG else ["-O3"]
SANITIZERS = [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer"] if SANITIZE else []

# What any extension may include or cimport: a change in one of them rebuilds all, which beats a wrong build.
SHARED_SOURCES = [str(p) for pattern in ("_c/*.h", "**/*.pxd") for p in sorted(Path("fastref").glob(pattern))]


def extension(source: Path) -> Extension:
    """Describe the module that one ``.pyx`` file becomes."""
    return Extension(
        ".".join(source.with_suffix("").parts),
        [str(source)],
        include_dirs=["fastref/_c"],
        depends=[*SHARED_SOURCES, "setup.py"],
        define_macros=[("FR_DEBUG", "1")] if DEBUG else [],
        extra_compile_args=["-std=gnu11", "-fvisibility=hidden", *OPTIMIZATION, *WARNINGS, *SANITIZERS],
        extra_link_args=SANITIZERS,
    )


setup(
    ext_modules=cythonize(
        [extension(source) for source in sorted(Path("fastref").glob("**/*.pyx"))],
        build_dir=str(BUILD_BASE / "cython"),
        nthreads=2,
        language_level=3,
        compiler_directives={
            "binding": True,
            "boundscheck": DEBUG,
            "embedsignature": True,
            "embedsignature.format": "python",
            "initializedcheck": DEBUG,
            "wraparound": False,
        },
    ),
    options={"build": {"build_base": str(BUILD_BASE)}, "build_ext": {"parallel": 2}},
)
