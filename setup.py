from pathlib import Path

from setuptools import find_packages, setup


version = next(
    line.split('"')[1]
    for line in Path("siss_diffusers/__init__.py").read_text().splitlines()
    if "__version__ =" in line
)

extras = {
    # the commands of `siss`: k-means, charts; inception scores and the digit classifier of the demos
    "eval": ["scikit-learn>=1.5", "scipy>=1.13", "matplotlib>=3.9"],
    "8bit": ["bitsandbytes>=0.45"],
    "wandb": ["wandb>=0.19"],
    "quality": ["ruff>=0.12"],
}
extras["dev"] = [
    *extras["eval"],
    *extras["8bit"],
    *extras["quality"],
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "torchmetrics>=1.6",
]

setup(
    name="siss_diffusers",
    version=version,
    description="Data unlearning for diffusers: make a diffusion model forget training images and keep the rest",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["siss_diffusers", "siss_diffusers.*"]),
    py_modules=["train_siss_unconditional", "train_siss_sd"],
    entry_points={"console_scripts": ["siss=siss_diffusers.commands.cli:cli"]},
    package_data={
        "siss_diffusers": ["py.typed"],
        "siss_diffusers.assets": ["*/*.json", "*/*.md", "*/*/*.json", "*/*/*.jinja", "*/*/*.safetensors"],
        "siss_diffusers.hub": ["*.jinja"],
        "siss_diffusers.report": ["*.jinja", "*.css"],
    },
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "diffusers>=0.42",
        "transformers>=5.6",
        "accelerate>=1.15",
        "peft>=0.21",
        "datasets>=5",
        "safetensors>=0.5",
        "jinja2>=3.1",
        "tensorboard>=2.16",
        "tqdm>=4.66",
        "Pillow>=10",
        "numpy>=1.26",
    ],
    extras_require=extras,
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
