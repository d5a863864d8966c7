"""Chat template of a data folder, for an export of a run that has learned conversations.

- The manifest of chat data names the template's file and its hash (`facts.chat`).
- Only a file with that hash is taken: a template that was edited would speak of turns that the
  model has never seen.
"""

from hashlib import sha256
from pathlib import Path

from k2train.data.manifest import read_manifest
from k2train.errors import DataError
from k2train.retry import retried
from k2train.safe_json import read_plain_file

MAX_TEMPLATE_BYTES = 2**24


def read_template(path: Path) -> str:
    """Read a Jinja template, as it is. Raises DataError."""
    try:
        return retried(lambda: read_plain_file(path, MAX_TEMPLATE_BYTES), path).decode("utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read ({why})") from None


def template_of_data(manifest_path: Path) -> str | None:
    """Return the chat template of a data folder; None for data without conversations.

    Raises DataError when the file is not there, or is not the one that the data was made with.
    """
    manifest = read_manifest(manifest_path)
    facts = manifest.facts.model_dump().get("chat")
    if facts is None:
        return None
    name, recorded = (
        (facts.get("file"), facts.get("sha256")) if isinstance(facts, dict) else (None, None)
    )
    if not isinstance(name, str) or Path(name).name != name or not isinstance(recorded, str):
        raise DataError(f"{manifest.path}: facts.chat does not name a file and its sha256")
    template = read_template(manifest.folder / name)
    found = sha256(template.encode()).hexdigest()
    if found != recorded:
        raise DataError(
            f"{manifest.folder / name} is not the template of this data: its sha256 is "
            f"{found[:12]}, that of the manifest {recorded[:12]}; put the right one there, or name "
            "one with --chat-template"
        )
    return template
