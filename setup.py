"""Packaging. `constraints.txt` pins what CI tests; the scripts install through it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
INIT = (ROOT / "src" / "cpm_bee" / "__init__.py").read_text(encoding="utf-8")

TENSORBOARD = ["tensorboard>=2.10"]
TINY_BASE = ["jieba>=0.42"]
# NF4 needs none of it; its kernels are used on a GPU, its bytes compared with ours in tests.
NF4 = ["bitsandbytes>=0.50"]

setup(
    name="cpm_bee",
    version=re.search(r'__version__ = "(.+)"', INIT)[1],
    description="Fine-tuning, evaluation and generation for the CPM-Bee language models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    package_dir={"": "src"},
    packages=find_packages("src"),
    python_requires=">=3.10",
    install_requires=["torch>=2.13", "numpy>=1.24", "safetensors>=0.4", "tqdm>=4.60"],
    extras_require={
        "bmtrain": ["bmtrain==1.0.1"],  # its wheels are for Python 3.10 and 3.11, Linux x86-64
        "nf4": NF4,
        "tensorboard": TENSORBOARD,
        "tiny-base": TINY_BASE,
        "dev": [
            "hypothesis>=6.100",
            "mypy>=1.10",
            "pytest>=8.0",
            "pytest-timeout>=2.3",
            "ruff>=0.9",
            *NF4,
            *TENSORBOARD,
            *TINY_BASE,
        ],
    },
)
