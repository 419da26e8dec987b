"""Maps the top-level folders into the one import name `twostep`, and attaches the kernels' build.

Everything else about the project stands in pyproject.toml. A folder becomes a part of `twostep` by existing:
`zoo/__init__.py` makes `twostep.zoo`, and `import zoo` does not work.
"""

import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # build_backend and twostep/version.py, also when run as `python setup.py`

from build_backend.extension import BuildKernels, WheelForEveryPython  # noqa: E402
from twostep.version import __version__  # noqa: E402

FOLDERS = {
    "twostep": "twostep",
    "twostep.zoo": "zoo",
    "twostep.losses": "losses",
    "twostep.train": "train",
    "twostep.evaluate": "evaluate",
    "twostep.export": "export",
}
present = {name: folder for name, folder in FOLDERS.items() if (ROOT / folder / "__init__.py").is_file()}
packages = [
    package
    for name, folder in present.items()
    for package in [name, *(f"{name}.{child}" for child in find_packages(str(ROOT / folder)))]
]

setup(
    version=__version__,
    packages=packages,
    package_dir=present,
    package_data={
        "twostep": ["py.typed"],
        "twostep.train": ["recipes/*.yaml"],
        "twostep.evaluate": ["pages/*.html"],
        "twostep.export": ["pipelines/*.py", "programs/*.py"],
        "twostep.zoo.miniature": ["weights/**"],
    },
    include_package_data=False,
    ext_modules=[Extension("twostep._C", sources=[])],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": WheelForEveryPython},
)
