"""Builds the extension `salt_ops`:  python setup.py build_ext"""
import glob
import sys

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# GCC's OpenMP calls resolve to the runtime that torch has loaded; linking another one would give two thread pools.
openmp = ["-fopenmp", "-DAT_PARALLEL_OPENMP=1"] if sys.platform == "linux" else []

setup(
    name="salt_ops",
    ext_modules=[CppExtension(
        "salt_ops", sorted(glob.glob("csrc/*.cpp")),
        depends=sorted(glob.glob("csrc/*.h")),  # or an edited header would not rebuild
        extra_compile_args=["-O3", "-g0", "-ffp-contract=off", *openmp])],
    options={"build_ext": {"inplace": True}},  # the extension lies beside the scripts that import it
    cmdclass={"build_ext": BuildExtension},
)
