"""What of a run may be uploaded: model files, the card and `unlearning.json`, by name; everything else stays."""

from pathlib import Path

from huggingface_hub import create_repo, upload_folder


PUBLIC_PATTERNS = (
    "README.md",
    "unlearning.json",
    "model_index.json",
    "unet/config.json",
    "unet/*.safetensors",
    "unet/*.safetensors.index.json",
    "scheduler/scheduler_config.json",
    # Stable Diffusion
    "pytorch_lora_weights.safetensors",
    "vae/config.json",
    "vae/*.safetensors",
    "text_encoder/config.json",
    "text_encoder/*.safetensors",
    "tokenizer/*.json",
    "tokenizer/merges.txt",
    "safety_checker/config.json",
    "safety_checker/*.safetensors",
    "feature_extractor/preprocessor_config.json",
)


def push(output_dir: Path, repo_id: str, token: str | None, private: bool) -> str:
    """Create the repository where needed and upload the public files in one commit; returns the repository's id."""
    repo_id = create_repo(repo_id, exist_ok=True, token=token, private=private or None).repo_id
    upload_folder(
        repo_id=repo_id,
        folder_path=output_dir,
        commit_message="Data unlearning with siss_diffusers",
        allow_patterns=list(PUBLIC_PATTERNS),
        token=token,
    )
    return repo_id
