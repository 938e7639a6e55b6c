"""Build the Cython extensions; everything else is in pyproject.toml.

The extensions are mandatory: an install whose build fails, fails.

Environment:
    ARKA_DEBUG=1   bounds checks, assertions and line tracing (for coverage and debuggers)
    ARKA_EXT=a,b   build only these modules of ``arka._core``
    CFLAGS         as usual; an -O in it replaces ours
"""

import os
import shutil
import sys
import sysconfig

# Before anything that may not work elsewhere.
if sys.platform != "linux":
    sys.exit(f"Arka runs on Linux alone (fdatasync, fallocate, /proc); this is {sys.platform}.")

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

DEBUG = os.environ.get("ARKA_DEBUG") == "1"
MODULES = (
    "acks",
    "buffers",
    "framing",
    "hpack",
    "ipc",
    "keys",
    "logthread",
    "lsn",
    "rowkeys",
    "runs",
    "transforms",
    "wire",
)
chosen = os.environ.get("ARKA_EXT")
modules = tuple(chosen.split(",")) if chosen else MODULES


class BuildExtensions(build_ext):
    """The usual build, which says in one line what it lacks."""

    def build_extensions(self):
        compiler = self.compiler.compiler_so[0]
        if shutil.which(compiler) is None:
            sys.exit(
                f"Arka needs a C compiler for its extensions, and {compiler!r} is not on the path: install one "
                "(Debian: apt-get install build-essential), or name it in CC."
            )
        if not any(os.path.exists(os.path.join(folder, "Python.h")) for folder in self.compiler.include_dirs):
            folder = sysconfig.get_path("include")
            sys.exit(f"Arka needs Python's headers, and {folder} has none (Debian: apt-get install python3-dev).")
        super().build_extensions()


optimisation = [] if "-O" in os.environ.get("CFLAGS", "") else ["-O3"]
# An sdist and metadata need no C: it is generated where it is compiled.
compiles = sys.argv[1:2] not in (["sdist"], ["egg_info"], ["dist_info"])

extensions = [
    Extension(
        f"arka._core.{name}",
        [f"arka/_core/{name}.pyx"],
        extra_compile_args=["-O0", "-g"] if DEBUG else [*optimisation, "-fno-strict-aliasing", "-g0"],
        # Without the symbols that only a debugger reads: a third of the size.
        extra_link_args=[] if DEBUG else ["-Wl,--strip-all"],
        define_macros=[("CYTHON_TRACE", "1"), ("CYTHON_USE_SYS_MONITORING", "0")] if DEBUG else [],
    )
    for name in modules
]

setup(
    cmdclass={"build_ext": BuildExtensions},
    ext_modules=extensions
    if not compiles
    else cythonize(
        extensions,
        compiler_directives={
            "language_level": 3,
            # Neither pickling nor doctest tables: the stubs describe all there is.
            "auto_pickle": False,
            "autotestdict": False,
            "boundscheck": DEBUG,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": DEBUG,
            "linetrace": DEBUG,
            "embedsignature": True,
        },
    ),
)
