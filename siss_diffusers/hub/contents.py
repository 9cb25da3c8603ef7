"""What of a finished run may be published."""

import hashlib
import json
import shlex
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from siss_diffusers.errors import UsageError
from siss_diffusers.storage.files import read_json
from siss_diffusers.training.adapters import LORA_FILE


WEIGHTS = "diffusion_pytorch_model*.safetensors"
# Of a folder with a run; `*` does not cross folders. The card and the two JSON files are made for the upload.
PUBLIC_FILES = (
    LORA_FILE,
    "model_index.json",
    "unet/config.json",
    f"unet/{WEIGHTS}",
    f"unet/{WEIGHTS}.index.json",
    "scheduler/scheduler_config.json",
    "vae/config.json",
    f"vae/{WEIGHTS}",
    "text_encoder/config.json",
    "text_encoder/model*.safetensors",
    "text_encoder/model*.safetensors.index.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer/added_tokens.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "safety_checker/config.json",
    "safety_checker/model*.safetensors",
    "feature_extractor/preprocessor_config.json",
)


@dataclass(frozen=True)
class Upload:
    """A file of a repository.

    Args:
        source: where it is, or what it holds.
    """

    path_in_repo: str
    source: Path | bytes

    @property
    def size(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size


def read_run(run: Path, evaluation: str | None, base_model: str | None) -> tuple[dict, dict | None]:
    """The content of `unlearning.json`, and what may be published of `evaluation.json`.

    Raises:
        UsageError: where the folder holds no finished run, or the evaluation is of another model.
    """
    if not run.is_dir():
        raise UsageError(f"{run} is no folder; name the --output_dir of a finished run")
    if not (run / "unlearning.json").is_file():
        problem = "the run in it has not finished" if list(run.glob("checkpoint-*")) else "no run ended in it"
        raise UsageError(f"{run} holds no unlearning.json: {problem}; name the --output_dir of a finished run")
    report = load(run / "unlearning.json")
    if not (run / LORA_FILE).is_file() and not (run / "model_index.json").is_file():
        raise UsageError(f"{run} holds neither an adapter nor a pipeline; name the --output_dir of a finished run")
    if base_model is not None:
        report["base_model"] = base_model
    return report, load_evaluation(run, evaluation)


def model_files(run: Path) -> list[Upload]:
    """The files of the adapter or the pipeline."""
    uploads = []
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run).as_posix()
        fits = any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in PUBLIC_FILES)
        if fits and path.is_file():
            uploads.append(Upload(name, without_paths(path) if path.suffix == ".json" else path))
    return uploads


def load(path: Path) -> dict:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); repair or remove it")


def to_json(content: object) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def without_paths(path: Path) -> Path | bytes:
    """A configuration without the name of the folder that it was once loaded from."""
    content = load(path)
    if not isinstance(content, dict) or "_name_or_path" not in content:
        return path
    return to_json({key: value for key, value in content.items() if key != "_name_or_path"})


def weights_digest(folder: Path) -> str | None:
    """Identifies the weights of an adapter or a pipeline's UNet; None where there are none."""
    files = [folder / LORA_FILE] if (folder / LORA_FILE).is_file() else sorted((folder / "unet").glob(WEIGHTS))
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        with open(path, "rb") as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest() if files else None


def load_evaluation(run: Path, file: str | None) -> dict | None:
    """The figures of an `evaluation.json` and none of its words; None where there is none.

    Raises:
        UsageError: where it cannot be read, or is of other weights than those of the run.
    """
    path = run / "evaluation.json" if file is None else Path(file)
    if path.is_dir():
        path = path / "evaluation.json"
    if not path.is_file():
        if file is not None:
            raise UsageError(f"--evaluation: no file {path}")
        return None
    content = load(path)
    if not isinstance(content, dict) or not all(isinstance(content.get(name), dict) for name in ("base", "unlearned")):
        raise UsageError(f"--evaluation: {path} is no evaluation of a base and an unlearned model")
    settings = content.get("settings", {})
    if settings.get("unlearned_weights") not in (None, weights_digest(run)):
        raise UsageError(
            f"--evaluation: {path} is about other weights than those in {run}; run `siss evaluate --unlearned"
            f" {shlex.quote(str(run))}` again"
        )
    public = {name: only_figures(content[name]) for name in ("base", "unlearned")}
    kept = {name: value for name, value in settings.items() if name not in ("skipped", "versions")}
    public["settings"] = only_figures(kept) | {
        "versions": settings.get("versions", {}),
        # Which metrics, without the reasons: these may quote a file's name.
        "skipped": sorted(settings.get("skipped", {})),
    }
    return public


def only_figures(value: object) -> object:
    """Numbers, switches and nulls, however nested; no text, which might name what was forgotten."""
    if isinstance(value, dict):
        return {key: only_figures(item) for key, item in value.items() if not isinstance(item, str)}
    if isinstance(value, list):
        return [only_figures(item) for item in value if not isinstance(item, str)]
    return value
