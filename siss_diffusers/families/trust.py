"""What may be read of a model: safetensors and classes of the libraries, no pickles and no code."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from siss_diffusers.errors import UsageError, describe_error
from siss_diffusers.families.causes import cause_on_the_hub, check_is_pipeline, check_variant


PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
ONLY_PICKLES = (
    "holds its weights as pickles ({}), which can run code when they are read; save them as safetensors in a place that"
    " you trust, by loading and `save_pretrained(..., safe_serialization=True)`, or name a revision that has them"
)
COMPONENTS_WITH_WEIGHTS = ("unet", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
OWN_CODE = (
    "brings code of its own ({}), which is never run; use a model made of the classes of diffusers and transformers"
)


def check_safetensors(name: str | Path, flag: str) -> None:
    """Refuse a local pipeline or model whose weights are pickles.

    Raises:
        UsageError: naming the file that is one.
    """
    folder = Path(name)
    if os.path.isfile(name):
        folders = [folder] if folder.suffix in PICKLES else []
    elif os.path.isfile(folder / "model_index.json"):
        folders = [folder / component for component in COMPONENTS_WITH_WEIGHTS]
    else:
        folders = [folder]
    for part in folders:
        files = [part] if os.path.isfile(part) else sorted(part.iterdir()) if os.path.isdir(part) else []
        refuse_only_pickles(files, str(name), flag)


def refuse_only_pickles(files: Sequence[Path], what: str, flag: str) -> None:
    """Refuse weights whose files are pickles, without safetensors beside them.

    Args:
        files: of one component.
        what: its name, for the message.

    Raises:
        UsageError: naming the first pickle.
    """
    pickles = [file.name for file in files if file.suffix in PICKLES]
    if pickles and not any(file.suffix == ".safetensors" for file in files):
        raise UsageError(f"{flag}: {what} {ONLY_PICKLES.format(pickles[0])}")


def check_components(config: dict, name: str, flag: str) -> None:
    """Refuse a pipeline whose `model_index.json` names anything but classes of the libraries.

    Raises:
        UsageError: naming the component.
    """
    from diffusers import pipelines

    if isinstance(config["_class_name"], list):
        raise UsageError(f"{flag}: {name} {OWN_CODE.format('pipeline ' + '.'.join(map(str, config['_class_name'])))}")
    for component, value in config.items():
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and component[0] != "_":
            if value[0] not in ("diffusers", "transformers") and not hasattr(pipelines, value[0]):
                raise UsageError(f"{flag}: {name} {OWN_CODE.format(f'{component} of {value[0]}')}")


@contextmanager
def loading(name: str | Path, flag: str) -> Iterator[None]:
    """Explain what fails inside, where a model or its configuration is read by `use_safetensors=True`.

    Raises:
        UsageError: in one sentence, for pickles, for code, and for whatever else is wrong with the files.
    """
    try:
        check_safetensors(name, flag)
        yield
    except UsageError:
        raise
    except Exception as error:  # whatever the libraries make of a broken file
        if "custom code" in str(error) or "trust_remote_code" in str(error):
            raise UsageError(f"{flag}: {name} {OWN_CODE.format(describe_error(error))}") from error
        cause = cause_on_the_hub(error, str(name))
        if cause is not None:
            raise UsageError(f"{flag}: {name} {cause}") from error
        hint = ""
        if re.search(r"safetensors.*(found|weights)|file named .*safetensors", str(error)):
            check_variant_on_the_hub(str(name), flag)
            hint = "; pickles are not read, because they can run code"
        raise UsageError(f"{flag}: {name} cannot be loaded ({describe_error(error)}){hint}") from error


def check_variant_on_the_hub(name: str, flag: str) -> None:
    """Refuse weights that a repository holds in another variant only; a repository that cannot be listed passes.

    Raises:
        UsageError: naming the variants that are there.
    """
    if os.path.exists(name):
        return
    from huggingface_hub import list_repo_files

    try:
        files = list_repo_files(name)
    except Exception:  # the error that brought us here is the better one
        return
    by_component: dict[str, list[str]] = {}
    for file in files:
        component, _, rest = file.rpartition("/")
        if component in COMPONENTS_WITH_WEIGHTS:
            by_component.setdefault(component, []).append(rest)
    check_variant(by_component, None, name, flag)


def load_pipeline_config(name: str, flag: str, **where: str | None) -> dict:
    """Read the `model_index.json` of a pipeline: its class and those of its components.

    Raises:
        UsageError: where there is no pipeline, or one that must not be read.
    """
    from diffusers import DiffusionPipeline

    check_safetensors(name, flag)
    check_is_pipeline(name, flag)
    try:
        config = DiffusionPipeline.load_config(name, **where)
        check_components(config, name, flag)
        return config
    except UsageError:
        raise
    except Exception as error:  # whatever is there instead
        cause = cause_on_the_hub(error, name)
        if cause is not None:
            raise UsageError(f"{flag}: {name} {cause}") from error
        raise UsageError(f"{flag}: {name} is no diffusers pipeline ({describe_error(error)})") from error


def is_adapter(where: str, flag: str) -> bool:
    """Tell whether a folder or a repository on the Hub holds LoRA weights and no pipeline.

    Raises:
        UsageError: for weights that are pickles.
    """
    check_safetensors(where, flag)
    folder = Path(where)
    if os.path.isdir(where):
        return not (folder / "model_index.json").exists() and any(folder.glob("*lora*.safetensors"))
    from huggingface_hub import list_repo_files
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        files = list_repo_files(where)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError):
        return False
    found = [name for name in files if "lora" in name and name.endswith((".safetensors", *PICKLES))]
    if "model_index.json" in files or not found:
        return False
    if not any(name.endswith(".safetensors") for name in found):
        raise UsageError(f"{flag}: {where} {ONLY_PICKLES.format(found[0])}")
    return True
