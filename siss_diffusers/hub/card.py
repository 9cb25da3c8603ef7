"""The model card of a finished run."""

import logging
from pathlib import Path
from zlib import crc32

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx

from siss_diffusers.hub.contents import LORA_FILE, read_json_object


logger = logging.getLogger(__name__)
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


def make_card(run: Path, repo_id: str, report: dict, measured: dict | None, token: str | None) -> Path | bytes:
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
    pipeline = "StableDiffusionPipeline" if adapter else read_json_object(run / "model_index.json")["_class_name"]
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
