"""Why a checkpoint has no moments: thinned, imported or merged. No torch.

- Such a checkpoint starts a run (`run.init_from`) and cannot be continued.
"""

from pathlib import Path

from k2train.checkpoint.manifest import CheckpointManifest, is_thinned
from k2train.text import counted

ORIGIN = "hugging_face"
"""Key of the manifest that says where an imported checkpoint comes from."""


def why_without_moments(path: Path, manifest: CheckpointManifest) -> str:
    """Say why the checkpoint at `path` has no moments, as what follows its name; "" if it has."""
    if manifest.merged is not None:
        return f"was merged from {counted(len(manifest.merged.parents), 'checkpoint')}"
    if not is_thinned(path):
        return ""
    if ORIGIN in (manifest.model_extra or {}):
        return "was imported from a Hugging Face folder"
    return "was thinned to its weights"
