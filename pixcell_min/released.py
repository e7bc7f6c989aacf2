"""What others have released for PixCell: names on the Hugging Face hub, files, terms. A table.

Read in stored copies of the pages named in `source` (November 2026); the terms at the address
itself are those that hold. `tools.download` fetches, `tools.doctor` and `base` say what is missing.
"""

from pathlib import Path
from typing import NamedTuple

HUB = "https://huggingface.co"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
# PixCell's scheduler_config.json, as reported of the released pipeline.
SCHEDULER = {"_class_name": "DPMSolverMultistepScheduler", "num_train_timesteps": 1000,
             "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
             "prediction_type": "epsilon", "algorithm_type": "dpmsolver++", "solver_order": 2,
             "solver_type": "midpoint", "timestep_spacing": "linspace"}


class Release(NamedTuple):
    """One repository of the hub, as far as this code needs it."""

    repository: str  # owner/name on the hub
    files: tuple[str, ...]  # what the loader reads; nothing else is fetched
    gigabytes: float  # of all files, 10^9 bytes
    gated: bool  # its authors must first grant access, at `page`
    licence: str
    source: str  # where the licence was read

    @property
    def page(self) -> str:
        """The address at which access is asked for."""
        return f"{HUB}/{self.repository}"


_PIXCELL_FILES = ("scheduler/scheduler_config.json", "vae/config.json", "transformer/config.json",
                  "transformer/diffusion_pytorch_model.safetensors")
_PIXCELL_CODE = "the authors' code, which is not used here: CC BY-NC 4.0"

# The key is the folder under weights/ and the word on the command line.
RELEASES = {
    "pixcell-256": Release(
        "StonyBrook-CVLab/PixCell-256", _PIXCELL_FILES, 2.43, False,
        f"Apache-2.0 by the hub's tag; {_PIXCELL_CODE}",
        f"{HUB}/StonyBrook-CVLab/PixCell-256/tree/main, "
        "https://github.com/cvlab-stonybrook/PixCell/blob/main/LICENSE"),
    "pixcell-1024": Release(
        "StonyBrook-CVLab/PixCell-1024", _PIXCELL_FILES, 2.43, False,
        "none stated on the stored page (PixCell-256: Apache-2.0): ask its authors; "
        f"{_PIXCELL_CODE}",
        f"{HUB}/StonyBrook-CVLab/PixCell-1024, "
        "https://github.com/cvlab-stonybrook/PixCell/blob/main/LICENSE"),
    "uni2-h": Release(
        "MahmoodLab/UNI2-h", ("config.json", "pytorch_model.bin"), 2.73, True,
        "CC BY-NC-ND 4.0 and the gate's own terms: academic research only, no copy passed on, "
        "models trained on its outputs count as derivatives",
        f"{HUB}/MahmoodLab/UNI2-h"),
    "sd3-vae": Release(
        "stabilityai/stable-diffusion-3.5-large", (VAE_FILE,), 0.17, True,
        "Stability AI Community License: free below 1 M$ of yearly revenue, else by contract",
        f"{HUB}/stabilityai/stable-diffusion-3.5-large (model card; LICENSE.md there not read)"),
}


def how_to_get(*names: str) -> str:
    """The command that fetches these releases, as the end of an error line."""
    return f"python -m pixcell_min.tools.download {' '.join(names)}"


def release_of(path) -> str | None:
    """The release that a folder or hub name speaks of: the key in `RELEASES`, or None."""
    word = Path(path).name.lower()
    for name, release in RELEASES.items():
        repository = release.repository.lower()
        if word in (name, repository.split("/")[1], f"models--{repository.replace('/', '--')}"):
            return name
    return None
