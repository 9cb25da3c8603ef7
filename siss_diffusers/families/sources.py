"""Where a pipeline comes from: a folder, the Hub, or the memory of this process."""

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from siss_diffusers.errors import UsageError
from siss_diffusers.families.base import Family, silenced
from siss_diffusers.families.causes import check_parts, check_variant, variants_in
from siss_diffusers.families.saving import check_copyable, components_of, copy_rest
from siss_diffusers.families.trust import load_pipeline_config, loading
from siss_diffusers.storage.files import LORA_FILE


# Loaded as None in training: they are not needed, and a picture that the checker blacks out could not be compared.
NOT_IN_TRAINING = ("safety_checker", "feature_extractor", "image_encoder")


@dataclass
class NamedPipeline:
    """A pipeline by its folder or its name on the Hub.

    Args:
        network_revision: revision of the network, where it differs from that of the rest.
    """

    name: str
    flag: str = "--pretrained_model_name_or_path"
    revision: str | None = None
    variant: str | None = None
    cache_dir: str | None = None
    network_revision: str | None = None
    is_ours = True

    def __post_init__(self) -> None:
        self.name = str(self.name)  # pipelines remember where they come from as a `Path`, too

    def describe(self) -> str:
        return self.name

    @cached_property
    def pipeline_config(self) -> dict:
        # Not by Path: it raises for a name that is too long for a file.
        exists = {
            file: os.path.exists(os.path.join(self.name, file))
            for file in (LORA_FILE, "adapter_config.json", "model_index.json")
        }
        if any(exists.values()) and not exists["model_index.json"]:
            raise UsageError(f"{self.flag}: {self.name} is an adapter; name the pipeline that it was trained on")
        config = load_pipeline_config(self.name, self.flag, revision=self.revision, cache_dir=self.cache_dir)
        folder = Path(self.name)
        loaded = [name for name in components_of(config) if name not in NOT_IN_TRAINING and any(config[name])]
        if os.path.isdir(self.name):
            check_parts(folder, loaded, self.name, self.flag)
        files = {name: os.listdir(folder / name) for name in loaded if (folder / name).is_dir()}
        check_variant(files, self.variant, self.name, self.flag)
        return config

    def component_class(self, component: str) -> Any:
        import diffusers

        name = self.pipeline_config[component][1]
        if not hasattr(diffusers, str(name)):
            raise UsageError(
                f"{self.flag}: {component} of {self.name} is a {name}, which diffusers {diffusers.__version__} does not"
                " have; update diffusers"
            )
        return getattr(diffusers, name)

    def component_config(self, component: str) -> dict:
        return self._read_config(component)[0]

    def _read_config(self, component: str) -> tuple[dict, str | None]:
        """Return the configuration of a component, and the sub-folder that it is in."""
        model_class = self.component_class(component)
        # Of a repository without sub-folders, the network's configuration is that of the repository.
        failure = None
        for subfolder in (component, None):
            try:
                with loading(self.name, self.flag):
                    config = model_class.load_config(
                        self.name, subfolder=subfolder, revision=self.revision, cache_dir=self.cache_dir
                    )
            except UsageError as error:
                failure = failure or error
                continue
            # Schedulers are often exchanged in the index alone; they read the configurations of each other.
            known = isinstance(config, dict) and (
                component == "scheduler" or config.get("_class_name") == model_class.__name__
            )
            if known:
                return config, subfolder
        raise failure or UsageError(f"{self.flag}: {self.name} has no {component} of class {model_class.__name__}")

    def scheduler(self) -> Any:
        scheduler_class = self.component_class("scheduler")
        with loading(self.name, self.flag), silenced():
            return scheduler_class.from_config(self.component_config("scheduler"))

    def load_without_network(self, family: Family) -> Any:
        return self._load({family.network_name: None})

    def load_network(self, family: Family, pipeline) -> None:
        pipeline.register_modules(**{family.network_name: self.read_network(family)})

    def read_network(self, family: Family) -> nn.Module:
        """Read the network in float32."""
        folder = Path(self.name, family.network_name)
        # As in pipelines: a part without files of the variant is read from the plain ones.
        has_variant = not folder.is_dir() or self.variant in variants_in(os.listdir(folder))
        where = {
            "revision": self.network_revision or self.revision,
            "variant": self.variant if has_variant else None,
        }
        with loading(self.name, self.flag):
            network = self.component_class(family.network_name).from_pretrained(
                self.name,
                subfolder=self._read_config(family.network_name)[1],
                cache_dir=self.cache_dir,
                use_safetensors=True,
                dtype=torch.float32,
                **where,
            )
        refuse_missing_weights({family.network_name: network}, self.name, self.flag)
        return network

    def network_files(self, family: Family) -> list[Path]:
        """Return the files of the network's weights, of the variant where it has one."""
        folder = self.snapshot / family.network_name
        files = [file for file in sorted(folder.glob("*.safetensors")) if variants_in([file.name])]
        return [file for file in files if variants_in([file.name]) == {self.variant}] or files

    @cached_property
    def snapshot(self) -> Path:
        """The folder of the whole pipeline, downloaded where it is on the Hub."""
        if os.path.isdir(self.name):
            return Path(self.name)
        from diffusers import DiffusionPipeline

        with loading(self.name, self.flag):
            where = {"revision": self.revision, "variant": self.variant, "cache_dir": self.cache_dir}
            return Path(DiffusionPipeline.download(self.name, use_safetensors=True, **where))

    def check_rest(self, family: Family) -> None:
        check_copyable(self.snapshot, self.pipeline_config, family.network_name, self.name, self.flag)

    def save_rest(self, family: Family, pipeline, folder: Path) -> None:
        copy_rest(self.snapshot, self.pipeline_config, family.network_name, folder, self.variant)

    def network_skeleton(self, family: Family) -> nn.Module:
        from accelerate import init_empty_weights

        with init_empty_weights():
            model_class = self.component_class(family.network_name)
            return model_class.from_config(self.component_config(family.network_name))

    def _load(self, components: dict[str, Any]) -> Any:
        from diffusers import DiffusionPipeline

        unused = {name: None for name in NOT_IN_TRAINING if name in self.pipeline_config}
        if "safety_checker" in unused:
            unused["requires_safety_checker"] = False
        with loading(self.name, self.flag):
            pipeline = DiffusionPipeline.from_pretrained(
                self.name,
                revision=self.revision,
                variant=self.variant,
                cache_dir=self.cache_dir,
                use_safetensors=True,
                dtype=torch.float32,
                **(unused | components),
            )
        refuse_missing_weights(pipeline.components, self.name, self.flag)
        take_pictures_one_by_one(pipeline)
        return pipeline


def take_pictures_one_by_one(pipeline: Any) -> None:
    """Let the VAE of a pipeline, where it has one, encode and decode a batch picture by picture: 32 pictures of 512 pixels
    at once take 24 GiB. It also makes a picture independent of its batch."""
    vae = pipeline.components.get("vae")
    if vae is not None:
        vae.enable_slicing()


def refuse_missing_weights(components: dict[str, Any], name: str, flag: str) -> None:
    """Refuse networks whose files lack a weight: diffusers leaves it without values, and says so in a log at most.

    Raises:
        UsageError: naming the network and the weight.
    """
    for component, part in components.items():
        tensors = part.state_dict().items() if isinstance(part, nn.Module) else ()
        missing = [weight for weight, tensor in tensors if tensor.is_meta]
        if missing:
            raise UsageError(
                f"{flag}: the files of {component} in {name} lack {len(missing)} weights, such as {missing[0]}; copy or"
                " download them again"
            )


@dataclass
class LoadedPipeline:
    """A pipeline in memory, which is trained in place."""

    pipeline: Any
    flag: str = "pipeline"
    pipeline_config: dict = field(init=False)
    is_ours = False

    def __post_init__(self) -> None:
        from diffusers import DiffusionPipeline

        if not isinstance(self.pipeline, DiffusionPipeline):
            raise UsageError(
                f"{self.flag} must be a pipeline that is loaded, as by DiffusionPipeline.from_pretrained(...) of diffusers,"
                f" not {type(self.pipeline).__name__}"
            )
        self.pipeline_config = {
            name: list(value) if isinstance(value, tuple) else value for name, value in self.pipeline.config.items()
        } | {"_class_name": type(self.pipeline).__name__}

    def describe(self) -> str:
        name = self.pipeline.config.get("_name_or_path", "")
        return name if name and not os.path.exists(name) else f"the {type(self.pipeline).__name__}"

    def component_config(self, component: str) -> dict:
        return dict(getattr(self.pipeline, component).config)

    def scheduler(self) -> Any:
        return self.pipeline.scheduler

    def load_without_network(self, family: Family) -> Any:
        return self.pipeline

    def load_network(self, family: Family, pipeline) -> None:
        network = family.network(pipeline)
        if network.dtype != torch.float32:
            network.to(torch.float32)

    def check_rest(self, family: Family) -> None:
        pass  # it is in memory

    def save_rest(self, family: Family, pipeline, folder: Path) -> None:
        for name, component in self.pipeline.components.items():
            if name != family.network_name and component is not None:
                component.save_pretrained(folder / name)
        self.pipeline.save_config(folder)

    def network_skeleton(self, family: Family) -> nn.Module:
        return family.network(self.pipeline)
