"""The losses of the training scripts of diffusers, written as they are written there.

Each takes the network, the tensors of the conditions, the pipeline, clean samples, noise `(B, C, H, W)`, and indices `(B,)` of
noise levels from the least noisy.
"""

import torch
import torch.nn.functional as F
from diffusers import (
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
    QwenImagePipeline,
)
from diffusers.training_utils import compute_loss_weighting_for_sd3

from siss_diffusers.families import (
    Flux,
    Flux2Klein,
    PixArtSigma,
    QwenImage,
    Sana,
    StableDiffusion,
    StableDiffusion3,
    StableDiffusionXL,
    ZImage,
)


def official_epsilon(pipeline, latents, noise, indices, predict) -> torch.Tensor:
    """The loss of train_text_to_image.py and train_text_to_image_sdxl.py of diffusers."""
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    noisy_latents = noise_scheduler.add_noise(latents, noise, indices)
    model_pred = predict(noisy_latents, indices)
    return F.mse_loss(model_pred.float(), noise.float(), reduction="mean")


def official_sd(network, tensors, pipeline, latents, noise, indices):
    def predict(noisy, timesteps):
        return network(noisy, timesteps, tensors["encoder_hidden_states"], return_dict=False)[0]

    return official_epsilon(pipeline, latents, noise, indices, predict)


def official_sdxl(network, tensors, pipeline, latents, noise, indices):
    def predict(noisy, timesteps):
        size = tuple(side * pipeline.vae_scale_factor for side in noisy.shape[-2:])
        add_time_ids = torch.cat([torch.tensor([list(size + (0, 0) + size)]) for _ in noisy])
        unet_added_conditions = {"time_ids": add_time_ids, "text_embeds": tensors["text_embeds"]}
        return network(
            noisy,
            timesteps,
            tensors["encoder_hidden_states"],
            added_cond_kwargs=unet_added_conditions,
            return_dict=False,
        )[0]

    return official_epsilon(pipeline, latents, noise, indices, predict)


def official_flow(pipeline, model_input, noise, indices, predict, config=None) -> torch.Tensor:
    """The loss of train_dreambooth_lora_sd3.py (with --precondition_outputs 0), and those for Flux, Flux.2 klein, Qwen-Image
    and Z-Image, with --weighting_scheme none. Their timesteps begin with the noisiest."""
    noise_scheduler = FlowMatchEulerDiscreteScheduler.from_config(config or pipeline.scheduler.config)
    step_indices = noise_scheduler.config.num_train_timesteps - 1 - indices
    timesteps = noise_scheduler.timesteps[step_indices]
    sigmas = noise_scheduler.sigmas[step_indices].flatten()[:, None, None, None]
    noisy_model_input = (1.0 - sigmas) * model_input + sigmas * noise
    model_pred = predict(noisy_model_input, timesteps)
    weighting = compute_loss_weighting_for_sd3(weighting_scheme="none", sigmas=sigmas)
    target = noise - model_input
    return torch.mean(
        (weighting.float() * (model_pred.float() - target.float()) ** 2).reshape(target.shape[0], -1), 1
    ).mean()


def official_sd3(network, tensors, pipeline, latents, noise, indices):
    def predict(noisy, timesteps):
        return network(
            hidden_states=noisy,
            timestep=timesteps,
            encoder_hidden_states=tensors["encoder_hidden_states"],
            pooled_projections=tensors["pooled_projections"],
            return_dict=False,
        )[0]

    return official_flow(pipeline, latents, noise, indices, predict)


def official_flux(network, tensors, pipeline, latents, noise, indices):
    def predict(noisy, timesteps):
        bsz, channels, height, width = noisy.shape
        guidance = torch.tensor([3.5]).expand(bsz) if network.config.guidance_embeds else None
        model_pred = network(
            hidden_states=FluxPipeline._pack_latents(noisy, bsz, channels, height, width),
            timestep=timesteps / 1000,
            guidance=guidance,
            pooled_projections=tensors["pooled_projections"],
            encoder_hidden_states=tensors["encoder_hidden_states"],
            txt_ids=torch.zeros(tensors["encoder_hidden_states"].shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(bsz, height // 2, width // 2, "cpu", torch.float32),
            return_dict=False,
        )[0]
        factor = pipeline.vae_scale_factor
        return FluxPipeline._unpack_latents(model_pred, height * factor, width * factor, factor)

    return official_flow(pipeline, latents, noise, indices, predict)


def official_flux2_klein(network, tensors, pipeline, latents, noise, indices):
    def predict(noisy, timesteps):
        model_input_ids = Flux2KleinPipeline._prepare_latent_ids(noisy)
        model_pred = network(
            hidden_states=Flux2KleinPipeline._pack_latents(noisy),
            timestep=timesteps / 1000,
            guidance=None,
            encoder_hidden_states=tensors["encoder_hidden_states"],
            txt_ids=Flux2KleinPipeline._prepare_text_ids(tensors["encoder_hidden_states"]),
            img_ids=model_input_ids,
            return_dict=False,
        )[0]
        return Flux2KleinPipeline._unpack_latents_with_ids(model_pred, model_input_ids)

    return official_flow(pipeline, latents, noise, indices, predict)


def official_qwen_image(network, tensors, pipeline, latents, noise, indices):
    def predict(noisy, timesteps):
        bsz, channels, height, width = noisy.shape
        model_pred = network(
            hidden_states=QwenImagePipeline._pack_latents(noisy[:, :, None], bsz, channels, height, width),
            encoder_hidden_states=tensors["encoder_hidden_states"],
            encoder_hidden_states_mask=tensors["encoder_hidden_states_mask"],
            timestep=timesteps / 1000,
            img_shapes=[(1, height // 2, width // 2)] * bsz,
            return_dict=False,
        )[0]
        factor = pipeline.vae_scale_factor
        return QwenImagePipeline._unpack_latents(model_pred, height * factor, width * factor, factor)[:, :, 0]

    return official_flow(pipeline, latents, noise, indices, predict)


def official_sana(network, tensors, pipeline, latents, noise, indices):
    def predict(noisy, timesteps):
        return network(
            hidden_states=noisy,
            encoder_hidden_states=tensors["encoder_hidden_states"],
            encoder_attention_mask=tensors["encoder_attention_mask"],
            timestep=timesteps * network.config.timestep_scale,
            return_dict=False,
        )[0]

    # The script leaves out the shift that the pipeline samples with.
    config = {"num_train_timesteps": 1000, "shift": pipeline.scheduler.config.flow_shift}
    return official_flow(pipeline, latents, noise, indices, predict, config)


def official_pixart_sigma(network, tensors, pipeline, latents, noise, indices):
    def predict(noisy, timesteps):
        return network(
            noisy,
            encoder_hidden_states=tensors["encoder_hidden_states"],
            encoder_attention_mask=tensors["encoder_attention_mask"],
            timestep=timesteps,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample.chunk(2, 1)[0]

    return official_epsilon(pipeline, latents, noise, indices, predict)


def official_z_image(network, tensors, pipeline, latents, noise, indices):
    prompt_embeds = [states[:length] for states, length in zip(tensors["cap_feats"], tensors["lengths"])]

    def predict(noisy, timesteps):
        timestep_normalized = (1000 - timesteps) / 1000
        noisy_model_input_list = list(noisy.unsqueeze(2).unbind(dim=0))
        model_pred_list = network(noisy_model_input_list, timestep_normalized, prompt_embeds, return_dict=False)[0]
        return -torch.stack(model_pred_list, dim=0).squeeze(2)

    return official_flow(pipeline, latents, noise, indices, predict)


OFFICIAL = {
    StableDiffusion: official_sd,
    StableDiffusionXL: official_sdxl,
    StableDiffusion3: official_sd3,
    Flux: official_flux,
    Flux2Klein: official_flux2_klein,
    QwenImage: official_qwen_image,
    ZImage: official_z_image,
    Sana: official_sana,
    PixArtSigma: official_pixart_sigma,
}
