"""Models by their name on the Hugging Face hub: weights and the files beside them, from Hugging Face's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from ovr_megatron.data.hf_assets import reason_of
from ovr_megatron.data.hf_files import HF_ASSETS
from ovr_megatron.errors import UserError

# Organisation and model, and perhaps a branch, tag or commit.
_NAME = re.compile(r"(?P<model>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w.-]+))?")
# Nothing else is downloaded: no code, no pickle.
_FILES = [*HF_ASSETS, "*.safetensors", "*.safetensors.index.json"]


class HubError(UserError, ValueError):
    """A model that is neither a folder nor to be had from the hub; names both remedies."""


def is_hub_name(path: str | Path) -> bool:
    """Whether ``path`` is written as a name on the hub, and nothing on this machine has the path or its folder."""
    return bool(_NAME.fullmatch(str(path))) and not Path(path).exists() and not Path(path).parent.is_dir()


def local_folder(path: str | Path) -> Path:
    """Return the folder of a model: ``path`` itself, or of ``ORGANISATION/MODEL[@REVISION]`` its copy in the cache.

    What is not there is downloaded once: processes of one machine wait for each other's lock. ``HF_HOME`` names the
    cache, ``HF_TOKEN`` opens gated models, and ``HF_HUB_OFFLINE=1`` takes only what the cache has.

    Raises:
        HubError: the hub does not give the model, or cannot be reached.
    """
    name = _NAME.fullmatch(str(path))
    if not name or not is_hub_name(path):
        return Path(path)
    try:
        return Path(snapshot_download(name["model"], revision=name["revision"], allow_patterns=_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise HubError(
            f"{path} is no folder on this machine, and the Hugging Face hub does not give it "
            f"({reason_of(error)}); give a folder, or download it where there is a network: "
            f"hf download {name['model']} --local-dir DIR"
        ) from None
