"""Choose which files of a finished run may be published. The default is no: a file goes up only if a rule names it."""

import hashlib
import json
import re
import shlex
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from siss_diffusers.errors import UsageError
from siss_diffusers.storage.files import LORA_FILE, read_json


MODEL_INDEX = "model_index.json"
NETWORKS = ("unet", "transformer")  # the components that a run may train

# File names of each kind of component, as regular expressions. The shards and precisions of weights are spelled out,
# so that other safetensors beside them, such as those of the base model, do not match.
PRECISION, SHARD = r"(\.(fp16|bf16))?", r"(-\d{5}-of-\d{5})?"
DIFFUSERS_WEIGHTS = rf"diffusion_pytorch_model{PRECISION}{SHARD}\.safetensors"
DIFFUSERS_MODEL = (
    r"config\.json",
    DIFFUSERS_WEIGHTS,
    rf"diffusion_pytorch_model\.safetensors\.index{PRECISION}\.json",
)
TRANSFORMERS_MODEL = (
    r"config\.json",
    r"generation_config\.json",
    rf"model{PRECISION}{SHARD}\.safetensors",
    rf"model\.safetensors\.index{PRECISION}\.json",
)
SCHEDULER = (r"scheduler_config\.json",)
TOKENIZER = (
    r"tokenizer\.json",
    r"tokenizer_config\.json",
    r"special_tokens_map\.json",
    r"added_tokens\.json",
    r"vocab\.(json|txt)",
    r"merges\.txt",
    r"(spiece|tokenizer|sentencepiece\.bpe)\.model",
    r"chat_template\.(json|jinja)",
)
IMAGE_PROCESSOR = (r"preprocessor_config\.json",)
PROCESSOR = (*TOKENIZER, *IMAGE_PROCESSOR, r"processor_config\.json", r"video_preprocessor_config\.json")
# The first part of a class's name that matches decides; a class without such a part is a model.
TRANSFORMERS_KINDS = {
    "Tokenizer": TOKENIZER,
    "ImageProcessor": IMAGE_PROCESSOR,
    "FeatureExtractor": IMAGE_PROCESSOR,
    "Processor": PROCESSOR,
}
# Keys under which the libraries write the folder that a component was loaded from.
PATH_KEYS = {"_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file"}


@dataclass(frozen=True)
class Upload:
    """A file of the repository.

    Args:
        path_in_repo: its path there.
        source: the file on this machine, or the content itself.
    """

    path_in_repo: str
    source: Path | bytes

    @property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size


def read_run(run: Path, evaluation: str | None, base_model: str | None) -> tuple[dict, dict | None]:
    """Read what a finished run reports about itself.

    Args:
        evaluation: an `evaluation.json`, or the folder of one. Default: the one in `run`, if there is one.
        base_model: the name of the base model, where it is to replace the one in the report.

    Returns:
        The content of `unlearning.json`, and the part of `evaluation.json` that may be published, or None.

    Raises:
        UsageError: if the folder holds no finished run, a file of it must not be published, or the evaluation belongs
            to another model.
    """
    if not run.is_dir():
        raise UsageError(f"{run} is not a folder; name the --output_dir of a finished run")
    if not (run / "unlearning.json").is_file():
        problem = "its run has not finished" if list(run.glob("checkpoint-*")) else "no run has ended there"
        raise UsageError(f"{run} has no unlearning.json: {problem}; name the --output_dir of a finished run")
    report = read_json_object(run / "unlearning.json")
    if not list_model_files(run):
        raise UsageError(f"{run} holds neither an adapter nor a pipeline; name the --output_dir of a finished run")
    for name in ("unlearning.json", "README.md"):
        refuse_symbolic_link(run / name)
    if base_model is not None:
        report = {name: value for name, value in report.items() if name not in ("base_revision", "base_variant")}
        report["base_model"] = base_model
    return report, read_public_evaluation(run, evaluation)


def read_json_object(path: Path) -> dict:
    """Read a JSON file that holds an object.

    Raises:
        UsageError: if it cannot be read, or holds something else.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); repair or remove it")
    if not isinstance(content, dict):
        raise UsageError(f"{path} cannot be read (it holds no JSON object); repair or remove it")
    return content


def to_json_bytes(content: object) -> bytes:
    """Return the bytes of a JSON file."""
    return (json.dumps(content, indent=2) + "\n").encode()


def read_components(run: Path) -> dict[str, tuple[str, str]]:
    """Read the components of a pipeline from its `model_index.json`.

    Returns:
        Library and class by name of the component, which is also the name of its folder. Empty for an adapter.

    Raises:
        UsageError: for a name that is not a plain word, or a class from outside of diffusers and transformers.
    """
    path = run / MODEL_INDEX
    if not path.is_file():
        return {}
    components = {}
    for name, value in read_json_object(path).items():
        if name.startswith("_") or not isinstance(value, list) or value == [None, None]:
            continue  # a setting of the pipeline, or a component that it does without
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
            raise UsageError(f"{path}: {name!r} is not the name of a component; remove that line")
        if len(value) != 2 or not all(isinstance(word, str) for word in value) or not is_known_library(value[0]):
            raise UsageError(
                f"{path}: {name} is not a class of diffusers or transformers ({value}), and only those are published;"
                " publish this pipeline by hand"
            )
        components[name] = tuple(value)
    return components


def is_known_library(name: str) -> bool:
    """Return whether `model_index.json` may name this library: diffusers, transformers, or the module of a pipeline of
    diffusers, such as `stable_diffusion`, which has a safety checker of its own."""
    if name in ("diffusers", "transformers"):
        return True
    return name.isidentifier() and find_spec(f"diffusers.pipelines.{name}") is not None


def public_file_names(library: str, class_name: str) -> tuple[str, ...]:
    """Return the regular expressions of the file names that a component of this class is saved under."""
    if library == "diffusers":
        return SCHEDULER if class_name.endswith("Scheduler") else DIFFUSERS_MODEL
    if library == "transformers":
        return next((names for part, names in TRANSFORMERS_KINDS.items() if part in class_name), TRANSFORMERS_MODEL)
    return (*DIFFUSERS_MODEL, *TRANSFORMERS_MODEL)


def list_model_files(run: Path) -> list[Path]:
    """List the files of the adapter or the pipeline that may be published.

    Raises:
        UsageError: if one of them is a symbolic link, or a component of the pipeline has no file to publish.
    """
    paths = [run / name for name in (LORA_FILE, MODEL_INDEX) if (run / name).is_file()]
    for component, (library, class_name) in read_components(run).items():
        names = public_file_names(library, class_name)
        folder = run / component
        refuse_symbolic_link(folder)
        files = [path for path in folder.glob("*") if any(re.fullmatch(name, path.name) for name in names)]
        files = [path for path in files if path.is_file() or path.is_symlink()]
        # Without its weights or its configuration the pipeline would not load.
        needed = ".safetensors" if any("safetensors" in name for name in names) else ".json"
        if not any(path.suffix == needed for path in files):
            raise UsageError(f"{folder} holds no {needed} file, which {class_name} needs; save the pipeline again")
        paths += files
    for path in paths:
        refuse_symbolic_link(path)
    return sorted(paths)


def refuse_symbolic_link(path: Path) -> None:
    """Refuse to publish through a link, which may lead to any file of this machine.

    Raises:
        UsageError: if the path is a symbolic link.
    """
    if path.is_symlink():
        raise UsageError(f"{path} is a symbolic link, and those are not published; put a copy in its place")


def model_uploads(run: Path) -> list[Upload]:
    """Return the files of the adapter or the pipeline, configurations without the paths of this machine.

    Raises:
        UsageError: as `list_model_files`.
    """
    uploads = []
    for path in list_model_files(run):
        is_config = path.name == MODEL_INDEX or path.name.endswith("config.json")
        uploads.append(Upload(path.relative_to(run).as_posix(), without_paths(path) if is_config else path))
    return uploads


def without_paths(path: Path) -> Path | bytes:
    """Return a configuration without the folder that it was loaded from; the file itself if it names none."""
    content = read_json_object(path)
    cleaned = drop_keys(content, PATH_KEYS)
    return path if cleaned == content else to_json_bytes(cleaned)


def drop_keys(value: object, keys: set[str]) -> object:
    """Return a copy of a JSON value without these keys, however deep."""
    if isinstance(value, dict):
        return {key: drop_keys(item, keys) for key, item in value.items() if key not in keys}
    if isinstance(value, list):
        return [drop_keys(item, keys) for item in value]
    return value


def weights_digest(folder: Path) -> str | None:
    """Return a digest of the weights of an adapter, or of a pipeline's UNet or transformer; None if there are none."""
    files = [folder / LORA_FILE]
    if not files[0].is_file():
        candidates = [path for network in NETWORKS for path in (folder / network).glob("*.safetensors")]
        files = sorted(path for path in candidates if re.fullmatch(DIFFUSERS_WEIGHTS, path.name))
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest() if files else None


def read_public_evaluation(run: Path, file: str | None) -> dict | None:
    """Read the figures of an `evaluation.json`, and none of its texts.

    Args:
        file: the file, or its folder. Default: `evaluation.json` in `run`.

    Returns:
        The figures of the base and of the unlearned model, and the settings; None if there is no file by default.

    Raises:
        UsageError: if it cannot be read, or was measured on other weights than those of the run.
    """
    path = run / "evaluation.json" if file is None else Path(file)
    if path.is_dir():
        path = path / "evaluation.json"
    if not path.is_file():
        if file is not None:
            raise UsageError(f"--evaluation: there is no file {path}")
        return None
    content = read_json_object(path)
    settings = content.get("settings", {})
    if not all(isinstance(part, dict) for part in (content.get("base"), content.get("unlearned"), settings)):
        raise UsageError(f"--evaluation: {path} does not compare a base with an unlearned model")
    if settings.get("unlearned_weights") not in (None, weights_digest(run)):
        raise UsageError(
            f"--evaluation: {path} was measured on other weights than those in {run}; run `siss evaluate --unlearned"
            f" {shlex.quote(str(run))}` again"
        )
    public = {name: only_figures(content[name]) for name in ("base", "unlearned")}
    numeric = {name: value for name, value in settings.items() if name not in ("skipped", "versions")}
    public["settings"] = only_figures(numeric) | {
        "versions": settings.get("versions", {}),
        # The names of the metrics without the reasons, which may quote the name of a file.
        "skipped": sorted(settings.get("skipped", {})),
    }
    return public


def only_figures(value: object) -> object:
    """Return the numbers, booleans and nulls of a JSON value, however deep, without texts: these might name what was
    forgotten."""
    if isinstance(value, dict):
        return {key: only_figures(item) for key, item in value.items() if not isinstance(item, str)}
    if isinstance(value, list):
        return [only_figures(item) for item in value if not isinstance(item, str)]
    return value
