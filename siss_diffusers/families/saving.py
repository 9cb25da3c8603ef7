"""The saved pipeline: the files of the base as they are, and the network that was trained."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants

from siss_diffusers.errors import UsageError
from siss_diffusers.families.trust import refuse_only_pickles


logger = logging.getLogger(__name__)

INDEX = "model_index.json"
# A file of a component is copied only if its suffix is one of these: any other may hold pictures of the training set, or
# code.
TEXTS = (".json", ".txt", ".md", ".yaml", ".yml")
VOCABULARIES = (".model", ".bpe", ".jinja")
# Of the network, and beside the components, they may be weights before training, under whatever name.
WEIGHTS = (".safetensors", ".msgpack", ".h5", ".onnx", ".gguf")
LEGAL = ("license", "licence", "notice", "copying")


def components_of(config: dict) -> list[str]:
    """Return the components that a `model_index.json` names, those that are not there included."""
    return [name for name, value in config.items() if isinstance(value, list) and not name.startswith("_")]


def files_within(folder: Path) -> Iterator[Path]:
    """Yield the files of a component, hidden ones left out, as the cache of a download is."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def check_copyable(base: Path, config: dict, network_name: str, name: str, flag: str) -> None:
    """Check that everything but the network can be copied from a base into the result.

    Args:
        base: folder of the pipeline.
        config: its `model_index.json`.
        name: of the pipeline, for messages.

    Raises:
        UsageError: for a component whose weights are pickles, or that was not downloaded, and for links out of the base.
    """
    behind = left_behind(base, config, network_name)
    if behind:
        more = f" and {len(behind) - 5} more" if len(behind) > 5 else ""
        logger.info(f"Files of the base that are not copied into the result: {', '.join(behind[:5])}{more}")
    for component in components_of(config):
        folder = base / component
        if component == network_name or config[component][0] is None:
            continue
        if not folder.is_dir():
            # A local folder is as its owner made it; of a download everything has to be there.
            if base.as_posix() != Path(name).as_posix() and not (base / f"{component}_config.json").is_file():
                raise UsageError(
                    f"{flag}: {component} of {name} is not in the cache, and the saved pipeline needs it; download it"
                    f" by `hf download {name} --include '{component}/*'`, or add --use_lora"
                )
            continue
        files = list(files_within(folder))
        refuse_only_pickles(files, f"{component} of {name}", flag)
        for file in files:
            if file.is_symlink() and file.suffix != ".safetensors" and not leads_inside(file, base):
                raise UsageError(f"{flag}: {file} is a link out of {base}; put a copy of the file in its place")


def leads_inside(link: Path, base: Path) -> bool:
    """Tell whether a link leads to a file of the base, or of the cache of the Hub that the base lies in."""
    target, folder = link.resolve(), base.resolve()
    places = [folder, folder.parent.parent / "blobs", Path(constants.HF_HUB_CACHE).resolve()]
    return any(target.is_relative_to(place) for place in places)


def copy_rest(base: Path, config: dict, network_name: str, folder: Path, variant: str | None) -> None:
    """Copy the components of a base and the licence beside them, byte for byte, but for the weights of its network, and
    what `left_behind` names.

    Args:
        base: folder of the pipeline.
        config: its `model_index.json`.
        folder: where the network has been saved already.
        variant: the one that was trained: files that exist in it alone get the plain name, by which they are loaded
            without it.
    """
    for component in components_of(config):
        if component == network_name:
            copy_network_configs(base, component, folder / component)
        elif (base / component).is_dir():
            copy_component(base / component, folder / component, variant)
        elif (base / f"{component}_config.json").is_file():  # of a repository without sub-folders
            (folder / component).mkdir(exist_ok=True)
            shutil.copyfile(base / f"{component}_config.json", folder / component / f"{component}_config.json")
    for file in licences_beside(base):
        shutil.copyfile(file, folder / file.name)
    shutil.copyfile(base / INDEX, folder / INDEX)


def is_legal(file: Path) -> bool:
    """Tell whether a file is the text of a licence, by its name."""
    return file.stem.lower().startswith(LEGAL) and file.suffix.lower() in ("", ".rst", *TEXTS)


def licences_beside(base: Path) -> list[Path]:
    """Return the files beside the components that are copied. Other texts stay: where the base lies in the folder of its
    training, they may be captions, and no pipeline reads them."""
    files = [file for file in sorted(base.iterdir()) if file.is_file() and is_legal(file)]
    return [file for file in files if not file.is_symlink() or leads_inside(file, base)]


def left_behind(base: Path, config: dict, network_name: str) -> list[str]:
    """Return what of a base is not copied beside the weights of its network, for a message: other weights, pictures, code, and
    texts beside the components. Hidden files are not counted."""
    components = [name for name in components_of(config) if (base / name).is_dir()]
    copied = {file.name for file in licences_beside(base)} | {INDEX, *components}
    behind = [f"{path.name}/" if path.is_dir() else path.name for path in sorted(base.iterdir())]
    behind = [name for name in behind if name.rstrip("/") not in copied and not name.startswith(".")]
    for name in components:
        copied = network_configs(base / name) if name == network_name else component_files(base / name)
        for file in files_within(base / name):
            is_replaced = file.suffix == ".safetensors" and ".non_ema." not in file.name or ".index." in file.name
            if file not in copied and not (name == network_name and is_replaced):
                behind.append(file.relative_to(base).as_posix())
    return behind


def component_files(source: Path) -> list[Path]:
    """Return the files of a component that are copied."""
    suffixes = (*TEXTS, *VOCABULARIES, *WEIGHTS)
    return [file for file in files_within(source) if file.suffix.lower() in suffixes or is_legal(file)]


def network_configs(source: Path) -> list[Path]:
    """Return the texts about a network, but for the index of its shards."""
    files = [file for file in files_within(source) if file.parent == source and ".index." not in file.name]
    return [file for file in files if file.suffix.lower() in TEXTS]


def copy_component(source: Path, target: Path, variant: str | None) -> None:
    """Copy the files of a component."""
    files = {file.relative_to(source).as_posix(): file for file in component_files(source)}
    for name, file in files.items():
        plain = name.replace(f".{variant}.", ".") if variant else name
        copy = target / (name if plain in files else plain)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


def copy_network_configs(base: Path, component: str, target: Path) -> None:
    """Copy what describes the network: training has changed its weights alone."""
    source = base / component
    if not source.is_dir():
        if (base / "config.json").is_file():
            shutil.copyfile(base / "config.json", target / "config.json")
        return
    for file in network_configs(source):
        shutil.copyfile(file, target / file.name)
