from fnmatch import fnmatch

from siss_diffusers.hub import PUBLIC_PATTERNS


def test_only_model_files_card_and_report_are_public():
    """Matched as huggingface_hub does, where `*` crosses folders."""
    public = [
        "README.md",
        "unlearning.json",
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "scheduler/scheduler_config.json",
        "pytorch_lora_weights.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer/merges.txt",
    ]
    private = [
        "receipt.json",
        "train_log.jsonl",
        "validation_log.jsonl",
        "checkpoint-2/unet/diffusion_pytorch_model.safetensors",
        "checkpoint-2/unet/config.json",
        "checkpoint-2/state.safetensors",
        "checkpoint-2/pytorch_lora_weights.safetensors",
        "tmp-checkpoint-2/unet/config.json",
        "logs/train/events.out.tfevents.1",
        "data/garment.png",
        "notes.txt",
    ]
    assert [name for name in public + private if any(fnmatch(name, pattern) for pattern in PUBLIC_PATTERNS)] == public
