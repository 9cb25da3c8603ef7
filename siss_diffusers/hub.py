"""Publish a finished run on the Hugging Face Hub: the model, its card, `unlearning.json` and `evaluation.json`.

What goes up is chosen by name, listed before it goes, and goes in one commit. Checkpoints, logs, the receipt, images and
prompts stay where they are.
"""

import argparse
import hashlib
import json
import logging
import shlex
import time
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import count
from pathlib import Path
from zlib import crc32

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx, validate_repo_id

from siss_diffusers.checkpoints import read_json
from siss_diffusers.errors import RunError, UsageError
from siss_diffusers.lora import LORA_FILE


logger = logging.getLogger(__name__)

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
# The rate limits of the Hub count over five minutes.
MAX_ATTEMPTS, MAX_WAIT = 4, 300
CARD_MARK = "<!-- made by siss_diffusers; edit freely, then it is left as it is:"

METHOD_PAPERS = {
    "retrack": ("ReTrack", "https://arxiv.org/abs/2509.13007"),
    "erasediff": ("EraseDiff", "https://arxiv.org/abs/2401.05779"),
}
SISS_PAPER = ("Data Unlearning in Diffusion Models", "https://arxiv.org/abs/2503.01034")
CITATION = """@inproceedings{alberti2025data,
  title     = {Data Unlearning in Diffusion Models},
  author    = {Alberti, Silas and Hasanaliyev, Kenan and Shah, Manav and Ermon, Stefano},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  url       = {https://arxiv.org/abs/2503.01034}
}"""

# Rows of the table: entry of `evaluation.json`, what it is, factor and digits.
METRICS = (
    ("others_distance_to_keep", "samples that are no copies: L2 to the nearest image to keep", 1, 2),
    ("others_sharpness", "samples that are no copies: sharpness against images to keep", 1, 2),
    ("ordinary_copy_share", "copies among samples of ordinary prompts, %", 100, 2),
    ("drift", "ordinary samples: distance from the base's of the same seed", 1, 2),
    ("inception_score", "inception score, copies removed", 1, 3),
    ("classifier_accuracy", "samples read as prompted, %", 100, 1),
    ("fid", "FID", 1, 2),
    ("kid", "KID", 1, 4),
    ("clip_score", "CLIP score", 1, 3),
    ("clip_iqa", "CLIP-IQA", 1, 3),
    ("sscd_forget", "similarity to the forgotten images", 1, 3),
    ("nll_forget_bpd", "NLL of the forgotten images, bits/dim", 1, 2),
    ("nll_keep_bpd", "NLL of images to keep, bits/dim", 1, 2),
    ("text_noise_norm", "text-conditional noise norm of the memorized prompts", 1, 3),
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="DIR", help="The --output_dir of a finished run.")
    parser.add_argument("--hub_model_id", help="The repository; default: DIR's name, under your own.")
    parser.add_argument("--hub_token", help="The token for the Hub; default: that of `hf auth login`, or HF_TOKEN.")
    parser.add_argument("--hub_private_repo", action="store_true", help="Make the repository private.")
    parser.add_argument(
        "--evaluation",
        metavar="FILE",
        help="The evaluation.json that `siss evaluate` wrote about this model; default: the one in DIR, if any.",
    )
    parser.add_argument(
        "--base_model", help="Name of the base model on the Hub, where the run took it from a local folder."
    )
    parser.add_argument("--dry_run", action="store_true", help="List what would go up, and upload nothing.")


def main(args: argparse.Namespace) -> None:
    run = Path(args.run)
    repo_id = args.hub_model_id or run.resolve().name
    check_repo_id(repo_id, "--hub_model_id")
    if args.dry_run:
        uploads = collect(run, repo_id, args.evaluation, args.base_model, args.hub_token)
        print(listing(uploads, run, repo_id))
        print("Nothing was uploaded (--dry_run).")
        return
    read_run(run, args.evaluation, args.base_model)  # what is wrong with it is said before anything is created
    repo_id = create_repository(repo_id, args.hub_token, args.hub_private_repo)
    print(push(run, repo_id, args.hub_token, args.evaluation, args.base_model))


def check_repo_id(repo_id: str, flag: str) -> None:
    """
    Raises:
        UsageError: for what cannot be the name of a repository.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"{flag}: {repo_id!r} cannot name a repository ({str(error).splitlines()[0]})")


def explain(error: Exception, repo_id: str) -> str:
    """What the Hub did not like, and what helps."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__  # of a file that could not be stored
    response = getattr(error, "response", None)
    status = None if response is None else response.status_code
    message = getattr(error, "server_message", None) or str(error).splitlines()[0]
    if status == 401:
        return "the Hub does not know the token (401); give --hub_token or HF_TOKEN, or run `hf auth login`"
    if status == 403:
        return f"the token may not write to {repo_id} (403); use one with write access, or name another repository"
    if status == 404:
        return f"there is no {repo_id} that this token can see (404)"
    if status in (409, 412):
        return f"{repo_id} was changed by somebody else at the same time ({status})"
    if status == 429:
        seconds = response.headers.get("retry-after")
        return f"the Hub asks for fewer requests (429); wait {f'{seconds} seconds' if seconds else 'a while'}"
    if status is not None:
        return f"the Hub answered {status}: {message}"
    if isinstance(error, ValueError):
        return f"it is not accepted ({message})"
    return f"the Hub cannot be reached ({type(error).__name__}: {message})"


def create_repository(repo_id: str, token: str | None, private: bool) -> str:
    """Create the repository where there is none; its whole name.

    Raises:
        UsageError: where the token does not allow it, the Hub cannot be reached, or a repository that was to be private
            is public.
    """
    api = HfApi(token=token)
    try:
        # None leaves it to the organisation's default.
        repo_id = api.create_repo(repo_id, exist_ok=True, private=private or None).repo_id
        is_private = api.repo_info(repo_id).private
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise UsageError(f"--push_to_hub: {explain(error, repo_id)}")
    if private and not is_private:
        raise UsageError(
            f"--hub_private_repo: {repo_id} is there already, and public; make it private in its settings, or name"
            " another by --hub_model_id"
        )
    return repo_id


def again(run: Path, repo_id: str) -> str:
    return f"`siss push {shlex.quote(str(run))} --hub_model_id {repo_id}`"


def push(
    run: Path,
    repo_id: str,
    token: str | None,
    evaluation: str | None = None,
    base_model: str | None = None,
) -> str:
    """List what goes up, and upload it in one commit; the address of the repository.

    Raises:
        UsageError: where the folder holds no finished run.
        RunError: where the upload fails; nothing of it is in the repository then, and the run is as it was.
    """
    uploads = collect(run, repo_id, evaluation, base_model, token)
    print(listing(uploads, run, repo_id))
    card = next(upload.source for upload in uploads if upload.path_in_repo == "README.md")
    try:
        if isinstance(card, bytes):
            (run / "README.md").write_bytes(card)
    except OSError as error:
        (run / "README.md").unlink(missing_ok=True)
        raise RunError(
            f"nothing was uploaded: README.md could not be written ({error.strerror}); free some space and push again"
            f" by {again(run, repo_id)}"
        )
    try:
        address = commit(repo_id, uploads, token)
    except (HfHubHTTPError, httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        raise RunError(
            f"the upload failed: {explain(error, repo_id)}; the run is whole in {run}, push it again by"
            f" {again(run, repo_id)}"
        )
    return f"Pushed to {address}"


def commit(repo_id: str, uploads: list[Upload], token: str | None) -> str:
    """All files in one commit. What has been stored by an attempt is not sent again by the next; an attempt whose answer
    was lost makes the next one find nothing to do."""
    for attempt in count(1):
        try:
            return (
                HfApi(token=token)
                .create_commit(
                    repo_id=repo_id,
                    operations=[CommitOperationAdd(upload.path_in_repo, upload.source) for upload in uploads],
                    commit_message="Data unlearning with siss_diffusers",
                )
                .commit_url
            )
        except (HfHubHTTPError, httpx.TransportError) as error:
            response = getattr(error, "response", None)
            passing = response is None or response.status_code in (429, 500, 502, 503, 504)
            if not passing or attempt == MAX_ATTEMPTS:
                raise
            asked = "" if response is None else response.headers.get("retry-after", "")
            seconds = min(int(asked), MAX_WAIT) if asked.isdecimal() else 2 ** (attempt - 1)
            logger.warning(f"The upload failed for now: {explain(error, repo_id)}; trying again in {seconds} s")
            time.sleep(seconds)


def listing(uploads: list[Upload], run: Path, repo_id: str) -> str:
    """What goes up, and how many files stay."""
    width = max(len(upload.path_in_repo) for upload in uploads)
    lines = [f"To {repo_id}, in one commit:"]
    lines += [f"  {upload.path_in_repo:{width}}  {readable_size(upload.size):>9}" for upload in uploads]
    names = {upload.path_in_repo for upload in uploads}
    kept = sum(path.is_file() and path.relative_to(run).as_posix() not in names for path in run.rglob("*"))
    # Not their names: one may be that of a forgotten image.
    lines.append(f"{kept} other {'file stays' if kept == 1 else 'files stay'} here.")
    return "\n".join(lines)


def readable_size(size: int) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def collect(
    run: Path, repo_id: str, evaluation: str | None, base_model: str | None, token: str | None
) -> list[Upload]:
    """What of a finished run goes up, the card and the JSON files as they go up.

    Raises:
        UsageError: as `read_run`.
    """
    report, measured = read_run(run, evaluation, base_model)
    uploads = model_files(run)
    uploads.append(Upload("unlearning.json", to_json(report)))
    if measured is not None:
        uploads.append(Upload("evaluation.json", to_json(measured)))
    uploads.append(Upload("README.md", card_of(run, repo_id, report, measured, token)))
    return uploads


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


def card_of(run: Path, repo_id: str, report: dict, measured: dict | None, token: str | None) -> Path | bytes:
    """The card, made anew unless somebody has edited the one in the folder."""
    path = run / "README.md"
    if path.is_file():
        text, mark, checksum = path.read_text(encoding="utf-8").rpartition(CARD_MARK)
        if not mark or checksum.split()[:1] != [f"{crc32(text.encode()):08x}"]:
            logger.warning("README.md was edited by hand and goes up as it is; remove it to have it made anew")
            return path
    text = model_card(run, repo_id, report, measured, base_licence(report.get("base_model"), token)) + "\n"
    return f"{text}{CARD_MARK} {crc32(text.encode()):08x} -->\n".encode()


def base_licence(base_model: str | None, token: str | None) -> dict[str, str]:
    """The entries of the base model's card that tell its licence; empty where it cannot be asked."""
    if base_model is None:
        return {}
    try:
        card = HfApi(token=token).model_info(base_model).card_data
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError):
        card = None
    known = {} if card is None else card.to_dict()
    found = {name: known[name] for name in ("license", "license_name", "license_link") if known.get(name)}
    if not found:
        logger.warning(f"The licence of {base_model} is not known; add it to README.md, and push again")
    return found


def model_card(run: Path, repo_id: str, report: dict, measured: dict | None, licence: dict[str, str]) -> str:
    """Metadata and text of the card."""
    adapter = (run / LORA_FILE).is_file()
    pipeline = "StableDiffusionPipeline" if adapter else load(run / "model_index.json")["_class_name"]
    conditional = pipeline == "StableDiffusionPipeline"
    base, method = report.get("base_model"), report["method"]
    data = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter" if adapter else "finetune",
        library_name="diffusers",
        pipeline_tag="text-to-image" if conditional else "unconditional-image-generation",
        tags=[
            "data-unlearning",
            "siss" if method.startswith("siss") else method,
            *(["lora"] if adapter else []),
            "diffusers-training",
        ],
        **licence,
    )
    base_link = "its base model" if base is None else f"[{base}](https://huggingface.co/{base})"
    counts, images = report["data"], "image" if report["data"]["forget"] == 1 else "images"
    kind = "A LoRA adapter for" if adapter else "A fine-tuned copy of"
    summary = f"{kind} {base_link}, trained to forget {counts['forget']} training {images}"
    sections = [
        f"# {repo_id.rpartition('/')[2]}",
        f"{summary}. Made with siss_diffusers by data unlearning, method `{method}` ({paper(method)}).",
        "## Use",
        usage(repo_id, base, pipeline, adapter, conditional),
        "## What was forgotten",
        forgotten(counts),
        "## How",
        hyperparameters(report),
        "## What was measured",
        measurements(measured),
        "## Limits",
        limits(adapter),
        "## Citation",
        f"```bibtex\n{CITATION}\n```",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections)).content


def paper(method: str) -> str:
    papers = [METHOD_PAPERS[method]] if method in METHOD_PAPERS else []
    return "; ".join(f"[{title}]({address})" for title, address in [*papers, SISS_PAPER])


def usage(repo_id: str, base: str | None, pipeline: str, adapter: bool, conditional: bool) -> str:
    lines = [f"from diffusers import {pipeline}", ""]
    if adapter:
        lines += [f'pipeline = {pipeline}.from_pretrained("{base or "THE BASE MODEL"}")']
        lines += [f'pipeline.load_lora_weights("{repo_id}")']
    else:
        lines += [f'pipeline = {pipeline}.from_pretrained("{repo_id}")']
    prompt = '"a photograph of the sea"' if conditional else ""
    lines += [f"image = pipeline({prompt}).images[0]"]
    code = "\n".join(lines)
    text = f"```python\n{code}\n```"
    if adapter and base is None:
        text += "\n\nThe adapter was trained on a model that its author has not named here; put its name in."
    return text


def forgotten(counts: dict) -> str:
    images = "1 image" if counts["forget"] == 1 else f"{counts['forget']} images"
    return (
        f"{images} of the training set, while the model was trained on {counts['keep']} others to keep. Which they were"
        " is not told here, nor by a hash: it would tell anyone who holds an image whether it was among them."
    )


def hyperparameters(report: dict) -> str:
    settings, lora = report.get("settings", {}), report.get("lora")
    rows = [("method", f"`{report['method']}`")]
    rows += [(f"`{name}`", value) for name, value in report.get("method_args", {}).items()]
    if report.get("forget_scaling"):
        rows.append(("forget gradient scaled by", f"`{report['forget_scaling']}`, {report.get('forget_scale')}"))
    if settings.get("calibrate_forgetting"):
        rows.append(("forgetting calibrated at the quantile", settings["calibrate_forgetting"]))
    if lora:
        rows.append(("LoRA", f"rank {lora['rank']}, alpha {lora['alpha']:g}"))
    rows += [("optimizer steps", report["global_step"]), ("pairs a step", report["pairs_per_step"])]
    rows += [("skipped steps", report["skipped_steps"])]
    rows += [
        (name.replace("_", " "), settings[name]) for name in ("learning_rate", "lr_scheduler") if name in settings
    ]
    forget_ranges = report.get("forget_timestep_ranges", [report["timestep_range"]])
    between = ", then " if settings.get("forget_timestep_schedule") == "sequential" else " and in turns "
    rows += [
        (name, between.join("{} to {}".format(*found) for found in ranges))
        for name, ranges in (("timesteps", [report["timestep_range"]]), ("timesteps of forgetting", forget_ranges))
    ]
    rows += [("precision", settings.get("mixed_precision", "no")), ("seed", settings.get("seed"))]
    rows += [("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items()))]
    return table(("", ""), rows)


def table(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def measurements(measured: dict | None) -> str:
    if measured is None:
        return (
            "**Nothing.** This model was published without an evaluation: whether it still makes the forgotten images,"
            " and what else it lost, is not known."
        )
    base, unlearned = measured["base"], measured["unlearned"]
    rows = [("copies of the forgotten images among samples, % (95 % interval)", share(base), share(unlearned))]
    for name, label, factor, digits in METRICS:
        values = [model.get(name) for model in (base, unlearned)]
        if any(isinstance(value, int | float) for value in values):
            cells = [f"{factor * value:.{digits}f}" if isinstance(value, int | float) else "-" for value in values]
            rows.append((label, *cells))
    text = table(("", "base", "unlearned"), rows)
    if unlearned.get("relearning"):
        worst = max(point["copy_share"] for point in unlearned["relearning"])
        steps = unlearned["relearning"][-1]["step"]
        text += f"\n\nFine-tuned for {steps} steps on neighbours of the forgotten images, it gave at most"
        text += f" {100 * worst:.1f} % copies on the way."
    return text + "\n\nBoth models were sampled with the same seeds. The whole of it: `evaluation.json`."


def share(model: dict) -> str:
    if model.get("copy_share") is None:
        return "-"
    low, high = model.get("copy_share_low"), model.get("copy_share_high")
    interval = "" if low is None or high is None else f" [{100 * low:.2f}, {100 * high:.2f}]"
    of = f", of {model['samples']}" if model.get("samples") else ""
    return f"{100 * model['copy_share']:.2f}{interval}{of}"


def limits(adapter: bool) -> str:
    points = []
    if adapter:
        points.append(
            "**An adapter can be taken off again**, and then the base model makes the images as before. To honour a"
            " request for deletion, distribute fused or fully fine-tuned weights instead of the base with an adapter:"
            " `pipeline.fuse_lora()`, `pipeline.unload_lora_weights()`, `pipeline.save_pretrained(...)`."
        )
    points += [
        "Copies of the base model elsewhere are as they were.",
        "Fewer copies among samples, or none, do not prove that nothing of the images is left in the weights: other"
        " prompts, other seeds or further training may bring some of it back.",
        "Whoever has the base model can compare it with this one, and may find out what changed.",
        "Unlearning also changes what was to be kept; see what was measured, and what was not.",
    ]
    return "\n".join(f"- {point}" for point in points)
