"""Packages of a wheel: k2train, and `tools/`, `configs/` and a script under names of their own.

- All other facts are in `pyproject.toml`. It cannot rename a folder and list packages at once.
- `k2train.commands` runs the tools from there. What only a developer uses stays out.
"""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

TOOLS = "k2train_tools"
DEVELOPERS_PACKAGES = ("benchmarks*", "fault_tests*", "gpu_checks*")
DEVELOPERS_MODULES = ("bench", "config_", "drill_", "fault_run", "gpu_check", "mutation")


class BuildPython(build_py):
    """Leave developers' programs out of `tools/`."""

    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        if package != TOOLS:
            return found
        return [module for module in found if not module[1].startswith(DEVELOPERS_MODULES)]


own = find_packages("tools", exclude=DEVELOPERS_PACKAGES)
setup(
    packages=[
        *find_packages(include=["k2train", "k2train.*"]),
        TOOLS,
        *(f"{TOOLS}.{name}" for name in own),
        f"{TOOLS}.configs",
        f"{TOOLS}.scripts",
    ],
    package_dir={TOOLS: "tools", f"{TOOLS}.configs": "configs", f"{TOOLS}.scripts": "scripts"},
    package_data={
        f"{TOOLS}.configs": ["*/*.yaml", "*/*.jsonl"],
        f"{TOOLS}.scripts": ["pretrain.sbatch"],
        "k2train.gallery": ["static/*.js"],
    },
    cmdclass={"build_py": BuildPython},
)
