"""Write the model card of a finished run. The text is in `card.md.jinja`; the figures are those of `METRICS`."""

import logging
import math
from pathlib import Path
from zlib import crc32

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import httpx

from siss_diffusers.hub.contents import read_components
from siss_diffusers.methods import METHODS
from siss_diffusers.metrics import METRICS, Metric
from siss_diffusers.metrics.formats import interval_percent, percent
from siss_diffusers.storage.files import LORA_FILE


logger = logging.getLogger(__name__)
TEMPLATE = Path(__file__).parent / "card.md.jinja"
CARD_MARK = "<!-- Written by siss_diffusers. If you edit this file, it will not be overwritten. Checksum:"


def make_card(run: Path, repo_id: str, report: dict, evaluation: dict | None, token: str | None) -> Path | bytes:
    """Write the card anew, unless somebody has edited the one in the folder.

    Returns:
        The content of the new card, or the path of the edited one.
    """
    path = run / "README.md"
    if path.is_file():
        text, mark, checksum = path.read_text(encoding="utf-8").rpartition(CARD_MARK)
        if not mark or checksum.split()[:1] != [f"{crc32(text.encode()):08x}"]:
            logger.warning("README.md was edited by hand and is uploaded as it is; delete it to get a new one")
            return path
    text = render_card(run, repo_id, report, evaluation, fetch_base_licence(report.get("base_model"), token)) + "\n"
    return f"{text}{CARD_MARK} {crc32(text.encode()):08x} -->\n".encode()


def fetch_base_licence(base_model: str | None, token: str | None) -> dict[str, str]:
    """Ask the Hub for the licence of the base model.

    Returns:
        The entries about the licence from the metadata of its card; empty, after a warning, if there are none or the
        Hub does not answer.
    """
    if base_model is None:
        return {}
    try:
        card = HfApi(token=token).model_info(base_model).card_data
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError):
        card = None
    metadata = {} if card is None else card.to_dict()
    licence = {name: metadata[name] for name in ("license", "license_name", "license_link") if metadata.get(name)}
    if not licence:
        logger.warning(f"The licence of {base_model} is not known; add it to README.md and push again")
    return licence


def render_card(run: Path, repo_id: str, report: dict, evaluation: dict | None, licence: dict[str, str]) -> str:
    """Fill in the template.

    Args:
        report: the content of `unlearning.json`.
        evaluation: the public part of `evaluation.json`, or None.
        licence: entries for the metadata, as of `fetch_base_licence`.

    Returns:
        Metadata and text of the card.
    """
    is_adapter = (run / LORA_FILE).is_file()
    is_text_to_image = is_adapter or any(name.startswith("text_encoder") for name in read_components(run))
    method = report["method"]
    card = ModelCard.from_template(
        card_metadata(report, is_adapter, is_text_to_image, licence),
        template_path=str(TEMPLATE),
        repo_id=repo_id,
        repo_name=repo_id.rpartition("/")[2],
        base_model=report.get("base_model"),
        base_files={name: report[f"base_{name}"] for name in ("revision", "variant") if f"base_{name}" in report},
        is_adapter=is_adapter,
        is_text_to_image=is_text_to_image,
        data=report["data"],
        method=method,
        method_paper=METHODS[method].paper if method in METHODS else None,
        citation_url=METHODS["siss"].paper[1],
        training_settings=training_settings(report),
        figures=None if evaluation is None else figure_rows(evaluation),
        relearning=None if evaluation is None else relearning_result(evaluation["unlearned"]),
    )
    return card.content


def card_metadata(report: dict, is_adapter: bool, is_text_to_image: bool, licence: dict[str, str]) -> ModelCardData:
    """Return the metadata by which the Hub finds and labels the model."""
    base, method = report.get("base_model"), report["method"]
    tags = ["data-unlearning", "siss" if method.startswith("siss") else method]
    return ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter" if is_adapter else "finetune",
        library_name="diffusers",
        pipeline_tag="text-to-image" if is_text_to_image else "unconditional-image-generation",
        tags=[*tags, *(["lora"] if is_adapter else []), "diffusers-training"],
        **licence,
    )


def training_settings(report: dict) -> list[tuple[str, object]]:
    """Return the rows of the table of settings, as name and value."""
    settings, lora = report.get("settings", {}), report.get("lora")
    rows = [("method", f"`{report['method']}`")]
    rows += [(f"`{name}` of the method", value) for name, value in report.get("method_args", {}).items()]
    if report.get("forget_scaling"):
        scale = report.get("forget_scale")
        scaling = f"`{report['forget_scaling']}`" + ("" if scale is None else f", factor {scale}")
        rows.append(("scaling of the forget gradient", scaling))
    if settings.get("calibrate_forgetting"):
        rows.append(("quantile of calibrated forgetting", settings["calibrate_forgetting"]))
    if lora:
        rows.append(("LoRA", f"rank {lora['rank']}, alpha {lora['alpha']:g}"))
    rows += [("optimizer steps", report["global_step"]), ("pairs of images per step", report["pairs_per_step"])]
    rows.append(("skipped steps (the gradient was not finite)", report["skipped_steps"]))
    labels = {"learning_rate": "learning rate", "lr_scheduler": "learning rate schedule", "seed": "random seed"}
    rows += [(label, settings[name]) for name, label in labels.items() if name in settings]
    ranges = [report["timestep_range"]]
    separator = ", then " if settings.get("forget_timestep_schedule") == "sequential" else ", alternating with "
    rows.append(("timesteps", format_ranges(ranges, separator)))
    rows.append(("timesteps of forgetting", format_ranges(report.get("forget_timestep_ranges", ranges), separator)))
    rows.append(("mixed precision", settings.get("mixed_precision", "no")))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())))
    return rows


def format_ranges(ranges: list[tuple[int, int]], separator: str) -> str:
    """Return ranges of timesteps as text, such as "0 to 500, then 500 to 1000"."""
    return separator.join(f"{low} to {high}" for low, high in ranges)


def figure_rows(evaluation: dict) -> list[dict[str, str]]:
    """Return the rows of the table of figures: one for each metric that was measured for either model."""
    base, unlearned = evaluation["base"], evaluation["unlearned"]
    return [
        {
            "label": metric.label,
            "base": format_figure(metric, base),
            "unlearned": format_figure(metric, unlearned),
            "better": metric.better or "",
            "explanation": metric.explanation,
        }
        for metric in METRICS.values()
        if is_number(base.get(metric.key)) or is_number(unlearned.get(metric.key))
    ]


def format_figure(metric: Metric, figures: dict) -> str:
    """Return a figure as text, with its interval or standard deviation if there is one; "-" without a figure."""
    value, spread = figures.get(metric.key), figures.get(metric.spread)
    low, high = figures.get(f"{metric.key}_low"), figures.get(f"{metric.key}_high")
    if not is_number(value):
        return "-"
    text = metric.format(value)
    if is_number(low) and is_number(high):
        ends = interval_percent(low, high) if metric.format is percent else map(metric.format, (low, high))
        text += f" [{', '.join(ends)}]"
    if is_number(spread):
        text += f" ± {metric.format(spread)}"
    return text


def relearning_result(figures: dict) -> dict[str, object] | None:
    """Return for how many steps the model was fine-tuned to bring copies back, and the highest share of copies that it
    reached; None if this was not tested."""
    points = figures.get("relearning")
    if not points:
        return None
    # Where all samples were broken, no share was measured.
    measured = [point for point in points if is_number(point.get("copy_share"))]
    if not measured:
        return None
    return {"steps": measured[-1]["step"], "copies": percent(max(point["copy_share"] for point in measured))}


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
