"""Build the Cython extensions; everything else is in pyproject.toml.

The extensions are mandatory: an install whose build fails, fails.

Environment:
    ARKA_DEBUG=1   bounds checks, assertions and line tracing (for coverage and debuggers)
    ARKA_EXT=a,b   build only these modules of ``arka._core``
"""

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

DEBUG = os.environ.get("ARKA_DEBUG") == "1"
MODULES = ("acks", "buffers", "framing", "ipc", "keys", "logthread", "lsn", "rowkeys", "runs", "transforms", "wire")
chosen = os.environ.get("ARKA_EXT")
modules = tuple(chosen.split(",")) if chosen else MODULES

extensions = [
    Extension(
        f"arka._core.{name}",
        [f"arka/_core/{name}.pyx"],
        extra_compile_args=["-O0", "-g"] if DEBUG else ["-O3", "-fno-strict-aliasing"],
        define_macros=[("CYTHON_TRACE", "1"), ("CYTHON_USE_SYS_MONITORING", "0")] if DEBUG else [],
    )
    for name in modules
]

setup(
    ext_modules=cythonize(
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
