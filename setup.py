"""Which packages the wheel has; all else is in pyproject.toml.

In the clone the folders baselines/, eval/, configs/ and assets/ lie beside h2cache/. In the wheel they are inside it,
since others have packages of these names (h2cache/clone.py).
"""

from setuptools import find_packages, setup

CODE, DATA = ("baselines", "eval"), ("configs", "assets")
setup(
    packages=[
        *find_packages(include=["h2cache", "h2cache.*"]),
        *(f"h2cache.{name}" for name in find_packages(include=[*CODE, *(f"{name}.*" for name in CODE)])),
        *(f"h2cache.{name}" for name in DATA),
    ],
    package_dir={f"h2cache.{name}": name for name in (*CODE, *DATA)},
)
