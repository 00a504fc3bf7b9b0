"""How twotower is installed. Lower bounds alone: a pin here would pin every user."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
README = ROOT / "README.md"
# The version is written once, where `twotower.__version__` is; the package itself is not imported.
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "twotower/__init__.py").read_text())[1]
# What a wheel ships of `experiments`: names for --config, and the files that these read.
SHIPPED = ("configs/**/*.py", "features/*.json", "examples/tables/*")
EXTRAS = {
    "cuda": ["jax[cuda13]>=0.10"],
    "tpu": ["jax[tpu]>=0.10"],
    # pandas: MLflow reads the requests of a model as frames
    "mlflow": ["mlflow-skinny>=3.0", "sqlalchemy>=2.0", "alembic>=1.13", "pandas>=2.2"],
    "bigquery": ["google-cloud-bigquery>=3.20"],
    "text": ["onnxruntime>=1.20", "tokenizers>=0.20"],
    "redis": ["redis>=5.0"],
    "serve": [
        "starlette>=0.40",
        "uvicorn[standard]>=0.30",
        "msgspec>=0.19",
        "prometheus-client>=0.20",
    ],
    "client": ["httpx>=0.27", "msgspec>=0.19"],
    "plots": ["matplotlib>=3.8"],
    "als": ["implicit>=0.7"],
    "umap": ["umap-learn>=0.5.6"],
    "sweep": ["optuna>=4.0"],
    "stream": ["grain>=0.2.14", "array_record>=0.8"],
    "duckdb": ["duckdb>=2.0"],
    # It wants older releases of protobuf than others do: best in an environment of its own.
    "beam": ["apache-beam>=2.60", "duckdb>=2.0"],
    "faiss": ["faiss-cpu>=1.8"],
    "hnswlib": ["hnswlib>=0.8"],
    "dev": [
        "beartype>=0.20",
        "duckdb>=2.0",
        "faiss-cpu>=1.8",
        "httpx>=0.27",
        "mlflow>=3.0",  # its server
        "implicit>=0.7",
        "nbformat>=5.10",
        "onnx>=1.16",
        "optuna>=4.0",
        "pandas>=2.2",
        "playwright>=1.45",  # drives the system's Chromium
        "polars>=1.0",
        "pyright>=1.1.400",
        "pytest>=8.0",
        "pytest-xdist>=3.8",
        "pytrec-eval-terrier>=0.5.6",
        "ruff>=0.14",
        "schemathesis>=4.0",
        "setuptools>=77",  # builds the wheel that a test looks into
        "sqlglot>=30.0",  # tests run BigQuery's SQL on DuckDB
    ],
}


class BuildWithShipped(build_py):
    """Copies the shipped experiments to `twotower/shipped`, which lies in a wheel alone."""

    def run(self):
        super().run()
        # In a checkout the package finds the experiments themselves.
        if self.editable_mode:
            return
        for source in self._shipped():
            target = Path(self.build_lib, "twotower", "shipped", *source.parts[1:])
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(source, target)

    def get_source_files(self):
        # The source distribution takes its list from here.
        return [*super().get_source_files(), *map(str, self._shipped())]

    def _shipped(self):
        folder = Path("experiments")
        files = [path for pattern in SHIPPED for path in folder.glob(pattern)]
        return sorted(path for path in files if path.name != "__init__.py")


setup(
    name="twotower",
    version=VERSION,
    description="Two-tower retrieval in JAX: from a log of interactions to served recommendations.",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The twotower authors",
    license_expression="MIT",
    license_files=["LICENSE"],
    keywords=["recommender systems", "retrieval", "two-tower", "jax"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["twotower", "twotower.*"]),
    package_data={
        "twotower": ["py.typed"],
        "twotower.evaluation.report": ["static/*"],
        "twotower.pipeline.engines.warehouse": ["templates/*.sql"],
        "twotower.retrieval.item_map": ["map.js"],
        "twotower.serving.page": ["static/*"],
    },
    cmdclass={"build_py": BuildWithShipped},
    entry_points={"console_scripts": ["twotower = twotower.__main__:main"]},
    python_requires=">=3.11",
    install_requires=[
        "absl-py>=2.1",
        "etils>=1.9",
        "flatbuffers>=24.3",  # jax.export writes and reads by it without asking for it
        "flax>=0.12",
        "importlib_resources>=6.0",  # tensorflow-datasets imports it without asking for it
        "jax>=0.10",
        "jaxtyping>=0.3",
        "ml_collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.4",
        "orbax-checkpoint>=0.12",
        "pyarrow>=18.0",
        # Without a wheel search is exact.
        "scann>=1.4.2; platform_system == 'Linux' and python_version < '3.14'",
        "scipy>=1.13",
        "tabulate>=0.9",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.9",
        "tqdm>=4.66",
        "wcwidth>=0.2.13",  # by it tabulate knows how wide Arabic and Chinese letters are
    ],
    extras_require=EXTRAS,
)
