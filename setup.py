"""How twotower is installed. Lower bounds alone: a pin here would pin every user."""

from pathlib import Path

from setuptools import find_packages, setup

README = Path(__file__).parent / "README.md"
EXTRAS = {
    "cuda": ["jax[cuda13]>=0.10"],
    "tpu": ["jax[tpu]>=0.10"],
    "mlflow": ["mlflow-skinny>=3.0", "sqlalchemy>=2.0", "alembic>=1.13"],
    "bigquery": ["google-cloud-bigquery>=3.20"],
    "text": ["onnxruntime>=1.20", "tokenizers>=0.20"],
    "redis": ["redis>=5.0"],
    "plots": ["matplotlib>=3.8"],
    "faiss": ["faiss-cpu>=1.8"],
    "hnswlib": ["hnswlib>=0.8"],
    "dev": [
        "beartype>=0.20",
        "duckdb>=1.0",
        "faiss-cpu>=1.8",
        "onnx>=1.16",
        "pyright>=1.1.400",
        "pytest>=8.0",
        "pytest-xdist>=3.5",
        "pytrec-eval-terrier>=0.5.6",
        "ruff>=0.14",
    ],
}

setup(
    name="twotower",
    version="0.1.0",
    description="Two-tower retrieval in JAX: from a log of interactions to served recommendations.",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The twotower authors",
    license="MIT",
    packages=find_packages(include=["twotower", "twotower.*", "experiments", "experiments.*"]),
    package_data={"experiments": ["features/*.json"]},
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
