from pathlib import Path

import siss_diffusers


ROOT = Path(__file__).resolve().parents[2]
TINY_MODEL = Path(siss_diffusers.__file__).parent / "assets" / "tiny_ddpm_digits"
TINY_SD = Path(siss_diffusers.__file__).parent / "assets" / "tiny_sd"
