"""The local record of what was forgotten. It never leaves the output directory."""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from pathlib import Path

from siss_diffusers.storage.files import write_json


def write_receipt(path: Path, digests: Sequence[bytes]) -> None:
    """Write HMACs of the forgotten images' pixels with a fresh key kept beside them.

    Whoever holds the receipt and an image can show that this image was in the forget set. A plain hash in a published
    file would let anyone who holds the image do so. The file is readable by its owner only.

    Args:
        digests: of the decoded pixels, from `Images.look`.
    """
    key = secrets.token_bytes(32)
    write_json(
        path,
        {
            "never_publish": "whoever holds this file and an image can tell whether it was forgotten",
            "algorithm": "HMAC-SHA256 of the BLAKE2b-128 digest of the size and the 8-bit RGB pixels, upright and on white",
            "key": key.hex(),
            "forgotten": [hmac.new(key, digest, hashlib.sha256).hexdigest() for digest in digests],
        },
        mode=0o600,
    )
