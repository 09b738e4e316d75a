"""Models of the Hugging Face hub, by their names there: `owner/name`."""

from pathlib import Path

from salt import given_paths
from salt.errors import InputError

# configuration, processor, weights; not what else lies beside them
FILES = ["*.json", "model*.safetensors", "README.md"]


def download(name):
    """The folder of a model of the hub in its cache on this machine, fetched where it is not there
    yet. Raises InputError where it cannot be had, with the command that fetches it elsewhere.

    HF_HUB_OFFLINE, HF_HOME and HF_TOKEN mean what they always do.
    """
    told = given_paths.NOT_THERE["hub"].format(name, name, local=name.rpartition("/")[2])
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(told) from None
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=FILES))
        if not list(folder.glob("*.safetensors")):
            huggingface_hub.snapshot_download(name, allow_patterns=["pytorch_model.bin"])
    except (OSError, ValueError) as error:  # what all of its errors are
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{told} (the hub said: {why})") from None
    return folder
