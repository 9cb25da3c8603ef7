"""The network that is trained, with its optimizer, its schedule and its moving average."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from siss_diffusers.draws import ADAPTER, torch_seed
from siss_diffusers.families import Conditions, Family, PipelineSource
from siss_diffusers.gradients import PairedGradients, StepStats
from siss_diffusers.gradients.buffers import local
from siss_diffusers.settings import Settings
from siss_diffusers.storage.files import LORA_FILE
from siss_diffusers.storage.sharding import are_finite, is_sharded, load_model, reshard, save_model
from siss_diffusers.training.adapters import adapter_off, add_lora, load_lora, save_lora
from siss_diffusers.training.engines import callable_network, make_optimizer, prepare, take_step


class TrainedNetwork:
    """Trains a network, or an adapter in it, and saves and restores it.

    Args:
        pipeline: without its network, which is loaded into it.

    Attributes:
        model: what accelerate made of the network.
        module: the network itself.
        parameters: those that are trained.
    """

    def __init__(
        self, settings: Settings, accelerator: Accelerator, family: Family, source: PipelineSource, pipeline: Any
    ) -> None:
        self.settings, self.accelerator = settings, accelerator
        self.family, self.source, self.pipeline = family, source, pipeline
        source.load_network(family, pipeline)
        network = family.network(pipeline)
        if settings.adapter is None:
            network.requires_grad_(True)
        else:
            # With an adapter the frozen weights can be in half precision; what is trained is always in float32.
            precision = {"fp16": torch.float16, "bf16": torch.bfloat16}
            torch.manual_seed(torch_seed(settings.seed, ADAPTER))
            add_lora(network, settings.adapter, precision.get(settings.mixed_precision, torch.float32))
        self.frozen_copy = None
        if settings.keep_target == "base" and settings.adapter is None:
            self.frozen_copy = copy.deepcopy(network).requires_grad_(False).eval().to(accelerator.device)
        if settings.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if settings.enable_xformers_memory_efficient_attention:
            network.enable_xformers_memory_efficient_attention()
        network.train()
        trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(settings, trainable)
        # Not prepared: accelerate would step a prepared one once for every process.
        self.lr_scheduler = get_scheduler(
            settings.lr_scheduler,
            optimizer=optimizer,
            num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.max_train_steps,
        )
        self.model, self.optimizer = prepare(accelerator, network, optimizer)
        self.module = accelerator.unwrap_model(self.model, keep_torch_compile=False)
        self.call = callable_network(accelerator, self.model)
        self.parameters = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.ema = EMAModel(self.parameters, **settings.ema_arguments) if settings.use_ema else None
        if settings.offload_ema:
            self.ema.to("cpu")

    @property
    def sharded(self) -> bool:
        return is_sharded(self.module)

    @property
    def last_file(self) -> str:
        """The file of a result that is written last."""
        return "model_index.json" if self.settings.adapter is None else LORA_FILE

    def predict(self, noisy: Tensor, model_timesteps: Tensor, conditions: Conditions | None) -> Tensor:
        """Call the network; `(B, C, H, W)`."""
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            noisy = noisy.to(self.module.dtype)  # it is called without autocast
        return self.family.predict(self.call, noisy, model_timesteps, conditions)

    @torch.no_grad()
    def predict_of_base(self, noisy: Tensor, model_timesteps: Tensor, conditions: Conditions | None) -> Tensor:
        """Return what the network answered before the training: without its adapter, or by a frozen copy."""
        if self.frozen_copy is not None:
            with self.accelerator.autocast():
                return self.family.predict(self.frozen_copy, noisy, model_timesteps, conditions).float()
        with adapter_off(self.module):
            output = self.predict(noisy, model_timesteps, conditions).float()
        self.reshard()
        return output

    def step(self, gradients: PairedGradients, stats: StepStats) -> dict[str, float]:
        """Step down the combined gradient; a skipped step has none.

        Returns:
            The learning rate of the step, and other figures for the log.
        """
        take_step(self.accelerator, self.optimizer, gradients, stats)
        if stats.skipped:
            return {}
        figures = {"lr": self.lr_scheduler.get_last_lr()[0]}
        self.lr_scheduler.step()
        if self.ema is not None:
            if self.settings.offload_ema:
                self.ema.to(self.accelerator.device, non_blocking=True)
            self.ema.step(self.parameters)
            if self.settings.offload_ema:
                self.ema.to("cpu")
            figures["ema_decay"] = self.ema.cur_decay_value
        return figures

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Set the parameters inside to what is saved, evaluated and shown: the moving average where there is one."""
        if self.ema is None:
            yield
            return
        trained = [local(parameter).to("cpu", copy=True) for parameter in self.parameters]
        self.copy_average()
        try:
            yield
        finally:
            for parameter, weights in zip(self.parameters, trained):
                local(parameter).copy_(weights)

    def copy_average(self) -> None:
        """Replace the parameters by their moving average, where there is one."""
        if self.ema is not None:
            for parameter, average in zip(self.parameters, self.ema.shadow_params):
                local(parameter).copy_(local(average))

    def is_finite(self) -> bool:
        """Tell on all processes alike whether what was trained, and its moving average, is finite."""
        return are_finite([*self.parameters, *([] if self.ema is None else self.ema.shadow_params)])

    def reshard(self) -> None:
        """Forget the whole weights that FSDP 2 keeps after a forward without a backward."""
        reshard(self.module)

    # With no folder the next two hand over the shards of a process that does not write.

    def save_weights(self, folder: Path | None) -> None:
        """Save what is trained, for a checkpoint."""
        if self.settings.adapter is None:
            save_model(self.module, None if folder is None else folder / self.family.network_name)
        else:
            save_lora(self.module, folder, type(self.pipeline), self.family.network_name)

    def save_result(self, folder: Path | None) -> None:
        """Save the adapter, or the pipeline with the trained network."""
        with self.averaged():
            if self.settings.adapter is not None:
                save_lora(self.module, folder, type(self.pipeline), self.family.network_name)
            else:
                save_model(self.module, None if folder is None else folder / self.family.network_name)
        if folder is not None and self.settings.adapter is None:
            self.source.save_rest(self.family, self.pipeline, folder)
            if self.settings.scheduler_overrides:
                self.pipeline.scheduler.save_pretrained(folder / "scheduler")

    def load_weights(self, checkpoint: Path) -> None:
        """Load what `save_weights` saved."""
        if self.settings.adapter is None:
            load_model(self.module, checkpoint / self.family.network_name)
        else:
            load_lora(self.module, checkpoint, self.family.network_name)

    def hand_back(self) -> Any:
        """Return the pipeline with what was trained in it, as `save_result` saves it, ready to draw."""
        self.copy_average()
        network = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False, keep_torch_compile=False)
        network.eval()
        self.pipeline.register_modules(**{self.family.network_name: network})
        return self.pipeline
