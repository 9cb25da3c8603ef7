"""The entry point for Python: `unlearn(pipeline, forget, keep)`."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate.state import AcceleratorState
from PIL import Image

from siss_diffusers.curation import sample_keep_images
from siss_diffusers.data.captions import load_captions
from siss_diffusers.data.forget_set import forget_rows_of, warn_of_marks
from siss_diffusers.data.images import ImageTransform
from siss_diffusers.data.memory import rows_of
from siss_diffusers.data.sources import ImageRows
from siss_diffusers.data.split import GivenRows, check_other_splits
from siss_diffusers.errors import UsageError
from siss_diffusers.families import Family, LoadedPipeline, Sampling, find_family
from siss_diffusers.outcome import Outcome
from siss_diffusers.settings import Settings, TextToImageSettings, UnconditionalSettings, resolve
from siss_diffusers.storage.folders import made_folder
from siss_diffusers.training.output_dir import check_output_dir
from siss_diffusers.training.run import Run
from siss_diffusers.unlearning import fit, with_family_defaults


# Settings that name what Python has as an object.
OBJECTS_INSTEAD = (
    dict.fromkeys(
        ("pretrained_model_name_or_path", "revision", "variant", "non_ema_revision"), "give the pipeline itself"
    )
    | dict.fromkeys(
        ("train_data_dir", "dataset_name", "dataset_config_name", "image_column"), "give the data as `keep`"
    )
    | {"forget_data_dir": "give the data as `forget`"}
)


def unlearn(
    pipeline: Any,
    forget: Any = None,
    keep: Any = None,
    prompts: str | Sequence[str] | None = None,
    **settings: Any,
) -> Outcome:
    """Make a pipeline forget images and keep the rest; the entry point for Python.

    The pipeline is trained in place, its network in float32. With the same seed, data and settings its weights are those
    that the scripts give, bit for bit.

    Args:
        pipeline: a pipeline of a family in `siss_diffusers.families`.
        forget: the images to forget: a folder, a `datasets.Dataset`, or a list of PIL images or of (image, prompt)
            pairs. None: those that the keep set marks, by a boolean column `forget` or by `forget_column`.
        keep: the images to keep, in the same forms. None: samples of the pipeline itself for the prompts of the forget
            images, without copies of these; for text-to-image models only.
        prompts: of the forget images, one for all or one for each, where they bring none of their own.
        settings: as the flags of the scripts, such as `max_train_steps=35` or `use_lora=True`; see `docs/api.md`. Without
            an `output_dir` nothing is written that outlives the outcome.

    Raises:
        UsageError: in one sentence, for what cannot be used.
        RunError: where training fails.
    """
    source = LoadedPipeline(pipeline)
    family_class = find_family(source)
    settings_class = TextToImageSettings if family_class.has_prompts else UnconditionalSettings
    check_python_settings(settings)
    if isinstance(keep, str | Path):
        settings["train_data_dir"] = str(keep)  # what `forget_files` are names within
    check_one_forget_set(forget, settings)
    chosen, method, rule = resolve(settings_class.from_values({"report_to": "none"} | settings))
    family = family_class.from_source(source, chosen.resolution)
    if getattr(family.network(pipeline), "peft_config", None):
        raise UsageError(
            "pipeline: an adapter is loaded in it; take it off by pipeline.unload_lora_weights(), or make it part of the"
            " weights by pipeline.fuse_lora() first"
        )
    chosen = with_family_defaults(chosen, family, source)
    temporary = None if "output_dir" in settings else TemporaryDirectory(prefix="siss-")
    if temporary is None:
        named = {"forget": forget, "keep": keep, "pipeline": pipeline.config.get("_name_or_path")}
        check_output_dir(
            chosen, {name: at_home(value) for name, value in named.items() if isinstance(value, str | Path)}
        )
    else:
        chosen = chosen.replace(output_dir=temporary.name, checkpointing_steps=None)
    with own_accelerator_state(), made_folder("--output_dir", chosen.output_dir):
        given = given_rows(family, pipeline, forget, keep, prompts, chosen)
        run = Run(chosen, method, Path(chosen.output_dir), is_program=False, saves_model=temporary is None)
        outcome = fit(run, rule, family, source, given)
    outcome.temporary = temporary
    return outcome


def check_python_settings(settings: dict[str, Any]) -> None:
    """Refuse settings that only the scripts can use.

    Raises:
        UsageError: naming what to use instead.
    """
    for name, instead in OBJECTS_INSTEAD.items():
        if name in settings:
            raise UsageError(f"{name} is a flag of the scripts; in Python {instead}")
    if settings.get("push_to_hub") and "output_dir" not in settings:
        raise UsageError("push_to_hub needs output_dir; or call `push_to_hub(repo_id)` of what unlearn returns")


def check_one_forget_set(forget: Any, settings: dict[str, Any]) -> None:
    """Refuse images to forget beside settings that name others in the keep set: one of them would be kept.

    Raises:
        UsageError: naming both.
    """
    for name in ("forget_files", "forget_column", "forget_value"):
        if forget is not None and settings.get(name) is not None:
            raise UsageError(
                f"forget and {name} exclude each other; give one, or put the images that {name} names into `forget`, too"
            )


def given_rows(
    family: Family,
    pipeline: Any,
    forget: Any,
    keep: Any,
    prompts: str | Sequence[str] | None,
    settings: Settings,
) -> GivenRows:
    """Make rows of what `unlearn` was given.

    Raises:
        UsageError: for what cannot be used, or where nothing says what to forget or to keep.
    """
    captions = settings.caption_column if family.has_prompts else None
    forget, keep = (at_home(images) for images in (forget, keep))
    if forget is None:
        indices = None
        if keep is not None:
            train = rows_of(keep, "keep", captions, cache_dir=settings.cache_dir)
            selection = (settings.forget_files, settings.forget_column, settings.forget_value, settings.train_data_dir)
            indices = forget_rows_of(train.rows, train.column, *selection)
        if indices is None:
            raise UsageError("nothing to forget: give `forget`, or a `keep` set with a boolean column `forget`")
        if not settings.forget_files:
            check_other_splits(train, settings.forget_column, settings.forget_value)
        return GivenRows(train, forget_indices=indices)
    to_forget = rows_of(forget, "forget", captions, prompts, settings.cache_dir, every_file=True)
    if keep is None and not family.has_prompts:
        raise UsageError("nothing to keep: give `keep`; only text-to-image models can sample it for the prompts")
    if keep is None:
        keep = sampled_images(family, pipeline, to_forget, settings)
    train = rows_of(keep, "keep", captions, cache_dir=settings.cache_dir)
    warn_of_marks(train.rows, "`forget`")
    return GivenRows(train, to_forget)


def at_home(images: Any) -> Any:
    """Return a folder with `~` resolved, and anything else as it is."""
    return os.path.expanduser(images) if isinstance(images, str | Path) else images


def sampled_images(
    family: Family, pipeline: Any, to_forget: ImageRows, settings: TextToImageSettings
) -> list[tuple[Image.Image, str]]:
    """Sample images to keep for the prompts of the forget images, with their prompts, as `siss curate` does.

    Raises:
        UsageError: where the samples of a prompt are nothing but copies, or a prompt is missing.
    """
    images = to_forget.images(ImageTransform(family.channels, family.resolution, center_crop=True))
    references: dict[str, list[Image.Image]] = {}
    for index, prompt in enumerate(load_captions(images, settings.caption_column).to_pylist()):
        references.setdefault(prompt, []).append(images.open(index))
    sampling = Sampling(settings.num_inference_steps, settings.guidance_scale, settings.eval_batch_size, settings.seed)
    pairs = []
    for prompt, pictures in references.items():
        pairs += [
            (image, prompt) for image in sample_keep_images(family, pipeline, prompt, pictures, sampling=sampling)
        ]
    return pairs


@contextmanager
def own_accelerator_state() -> Iterator[None]:
    """Leave accelerate's state, which all of a process shares, as it was."""
    existed = bool(AcceleratorState._shared_state)
    try:
        yield
    finally:
        if not existed:
            AcceleratorState._reset_state(reset_partial_state=True)
