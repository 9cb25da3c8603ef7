"""Where a pipeline comes from: a folder, the Hub, or the memory of this process."""

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from siss_diffusers.errors import UsageError
from siss_diffusers.families.base import Family
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

    def describe(self) -> str:
        return self.name

    @cached_property
    def pipeline_config(self) -> dict:
        folder = Path(self.name)
        is_adapter = any((folder / file).exists() for file in (LORA_FILE, "adapter_config.json"))
        if is_adapter and not (folder / "model_index.json").exists():
            raise UsageError(f"{self.flag}: {self.name} is an adapter; name the pipeline that it was trained on")
        return load_pipeline_config(self.name, self.flag, revision=self.revision, cache_dir=self.cache_dir)

    def component_class(self, component: str) -> Any:
        import diffusers

        return getattr(diffusers, self.pipeline_config[component][1])

    def component_config(self, component: str) -> dict:
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
            if isinstance(config, dict) and config.get("_class_name") == model_class.__name__:
                return config
        raise failure or UsageError(f"{self.flag}: {self.name} has no {component} of class {model_class.__name__}")

    def load_without_network(self, family: Family) -> Any:
        return self._load({family.network_name: None})

    def load_network(self, family: Family, pipeline) -> None:
        where = {"revision": self.network_revision or self.revision, "variant": self.variant}
        with loading(self.name, self.flag):
            network = self.component_class(family.network_name).from_pretrained(
                self.name,
                subfolder=family.network_name,
                cache_dir=self.cache_dir,
                use_safetensors=True,
                dtype=torch.float32,
                **where,
            )
        pipeline.register_modules(**{family.network_name: network})

    def load_with_network(self, family: Family, network: Any) -> Any:
        return self._load({family.network_name: network})

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
            return DiffusionPipeline.from_pretrained(
                self.name,
                revision=self.revision,
                variant=self.variant,
                cache_dir=self.cache_dir,
                use_safetensors=True,
                dtype=torch.float32,
                **(unused | components),
            )


@dataclass
class LoadedPipeline:
    """A pipeline in memory, which is trained in place."""

    pipeline: Any
    flag: str = "pipeline"
    pipeline_config: dict = field(init=False)
    is_ours = False

    def __post_init__(self) -> None:
        self.pipeline_config = {
            name: list(value) if isinstance(value, tuple) else value for name, value in self.pipeline.config.items()
        } | {"_class_name": type(self.pipeline).__name__}

    def describe(self) -> str:
        name = self.pipeline.config.get("_name_or_path", "")
        return name if name and not os.path.exists(name) else f"the {type(self.pipeline).__name__}"

    def component_config(self, component: str) -> dict:
        return dict(getattr(self.pipeline, component).config)

    def load_without_network(self, family: Family) -> Any:
        return self.pipeline

    def load_network(self, family: Family, pipeline) -> None:
        network = family.network(pipeline)
        if network.dtype != torch.float32:
            network.to(torch.float32)

    def load_with_network(self, family: Family, network: Any) -> Any:
        self.pipeline.register_modules(**{family.network_name: network})
        return self.pipeline

    def network_skeleton(self, family: Family) -> nn.Module:
        return family.network(self.pipeline)
