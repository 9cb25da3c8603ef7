"""Why a name is no pipeline that can be loaded, and what to do about it, each in one sentence."""

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from siss_diffusers.errors import UsageError


WEIGHTS_FILE = re.compile(
    r"(?:diffusion_pytorch_)?model(?:-\d+-of-\d+)?(?:\.(?P<variant>[a-zA-Z][\w-]*?))?(?:-\d+-of-\d+)?\.safetensors"
)


def convert_sentence(file: Path) -> str:
    """Say how a single file becomes a folder that can be loaded."""
    return (
        f"is a checkpoint in a single file; convert it once, by StableDiffusionPipeline.from_single_file({str(file)!r})"
        f".save_pretrained({file.stem!r}) of diffusers, and name that folder"
    )


def check_is_pipeline(name: str, flag: str) -> None:
    """Refuse a name that is something else: an address, a file, a part of a pipeline, a folder that is not there.

    Raises:
        UsageError: saying what it is and what to name instead.
    """
    address = re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", name)
    if address:
        raise UsageError(f"{flag}: {name} is an address; name the repository, {address[1]}")
    folder = Path(name or "no name")
    if os.path.isfile(folder):  # unlike Path.is_file, this bears any name
        if "lora" in folder.name.lower():
            raise UsageError(f"{flag}: {name} is an adapter; name the pipeline that it was trained on")
        if folder.suffix == ".safetensors":
            raise UsageError(f"{flag}: {name} {convert_sentence(folder)}")
        raise UsageError(f"{flag}: {name} is a file; name the folder of a pipeline, which holds model_index.json")
    if os.path.isdir(folder):
        check_folder(folder, name, flag)
    elif looks_like_path(name):
        raise UsageError(f"{flag}: there is no folder {name or repr(name)}; name a folder or a repository on the Hub")


def looks_like_path(name: str) -> bool:
    """Tell whether a name can only be a path: names on the Hub are `owner/name`."""
    return not name or name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name or name.endswith("/")


def check_folder(folder: Path, name: str, flag: str) -> None:
    """Refuse a folder that is no pipeline.

    Raises:
        UsageError: saying what it is and what to name instead.
    """
    if (folder / "model_index.json").exists():
        return
    inside = [path.parent for pattern in ("*", "snapshots/*") for path in folder.glob(f"{pattern}/model_index.json")]
    if inside:
        raise UsageError(f"{flag}: {name} holds no model_index.json, but {inside[0]} does; name that folder")
    if (folder.parent / "model_index.json").exists() and (folder / "config.json").exists():
        raise UsageError(f"{flag}: {name} is a part of a pipeline; name the whole, {folder.parent}")
    model_class = None
    if (folder / "config.json").exists():
        try:
            model_class = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
        except (OSError, ValueError, AttributeError):
            pass
    if model_class:
        raise UsageError(
            f"{flag}: {name} is a {model_class} alone; name the folder of a whole pipeline, with model_index.json"
        )
    single = sorted(folder.glob("*.safetensors"))
    if single:
        raise UsageError(f"{flag}: {name} holds no model_index.json; {single[0].name} {convert_sentence(single[0])}")
    raise UsageError(
        f"{flag}: {name} is no diffusers pipeline: it holds no model_index.json; name the folder that does"
    )


def check_parts(folder: Path, components: Iterable[str], name: str, flag: str) -> None:
    """Refuse a folder that lacks a component which its index names.

    Args:
        components: that are loaded.

    Raises:
        UsageError: naming the first that is missing.
    """
    for component in components:
        # Of a repository without sub-folders, the configurations lie beside the index.
        flat = [folder / "config.json", folder / f"{component}_config.json"]
        if not (folder / component).is_dir() and not any(file.is_file() for file in flat):
            raise UsageError(
                f"{flag}: {name} holds no folder {component}, which its model_index.json names; copy or download it again"
            )


def variants_in(files: Iterable[str]) -> set[str | None]:
    """Return the variants of weights among names of files; None is the plain one."""
    matches = [WEIGHTS_FILE.fullmatch(file.rpartition("/")[2]) for file in files]
    return {match["variant"] for match in matches if match}


def check_variant(files_by_component: dict[str, list[str]], variant: str | None, name: str, flag: str) -> None:
    """Refuse weights that are there in another variant only.

    Args:
        files_by_component: names of the files of each component that is loaded.

    Raises:
        UsageError: naming the variants that are there.
    """
    there = {component: variants_in(files) for component, files in files_by_component.items()}
    named = sorted({found for variants in there.values() for found in variants if found})
    if variant is not None and named and variant not in named:
        raise UsageError(f"{flag}: {name} has no variant {variant}, only {', '.join(named)}; change --variant")
    if variant is not None and not named and any(there.values()):
        raise UsageError(f"{flag}: {name} has no variant {variant}; drop --variant")
    for component, variants in there.items():
        if variants and None not in variants and variant not in variants:
            choice = "fp16" if "fp16" in variants else sorted(variants)[0]
            pickles = any(file.endswith(".bin") for file in files_by_component[component])
            raise UsageError(
                f"{flag}: {name} cannot be loaded: {component} has weights of the variant"
                f" {' or '.join(sorted(variants))} only{'; pickles are not read, for they can run code' * pickles};"
                f" add --variant {choice}"
            )


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it came from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def cause_on_the_hub(error: BaseException, name: str) -> str | None:
    """Return why a repository could not be read, and the cure; None for any other error, or for a local folder."""
    if os.path.exists(name):
        return None
    chain = list(chain_of(error))
    if any(isinstance(one, GatedRepoError) for one in chain):
        return f"asks for consent: accept its terms on https://huggingface.co/{name}, then `hf auth login`"
    if any(isinstance(one, RevisionNotFoundError) for one in chain):
        return "has no such revision; change --revision, or drop it"
    if any(isinstance(one, RepositoryNotFoundError) for one in chain):
        return "is neither a folder nor a repository on the Hub that you may read; check the name, or `hf auth login`"
    if any(isinstance(one, HFValidationError) for one in chain):
        return "is neither a folder nor a name that the Hub allows; check it"
    unreached = (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError, TimeoutError)
    if any(isinstance(one, unreached) or "couldn't connect" in str(one).lower() for one in chain):
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        why = "HF_HUB_OFFLINE is set; unset it" if offline else "the Hub cannot be reached; check the connection"
        return f"is no folder and not in the cache, and {why}, or fetch it before by `hf download {name}`"
    return None
