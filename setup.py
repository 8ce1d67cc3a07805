"""Builds the CPU kernel into the package; everything else is in pyproject.toml.

`src/rdrop/kernels/rows.so` is a plain C library, loaded with ctypes: it depends neither on Python's version nor on
torch's. It is optional: without a C++ compiler the installation succeeds and `rdrop_loss` runs on its reference.
"""

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + ".so"

    def get_export_symbols(self, ext):
        return []


class WheelForAnyPython(bdist_wheel):
    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "rdrop.kernels.rows",
            sources=["src/rdrop/kernels/rows.cpp"],
            depends=["src/rdrop/kernels/rows_vector.h"],
            extra_compile_args=[
                *("-std=c++17", "-O3", "-g0", "-ffp-contract=fast", "-fvisibility=hidden", "-pthread"),
                *("-Wno-psabi", "-Wno-maybe-uninitialized"),  # vectors stay inside; GCC's own AVX-512 header
            ],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": WheelForAnyPython},
)
