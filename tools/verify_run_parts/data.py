"""Data folder of a run: is it the one that the run read, and is every byte of it whole."""

from collections.abc import Iterator
from pathlib import Path

from k2train.config.load import load_config
from k2train.data.inspect.fed_steps import fed_problems
from k2train.data.manifest import MANIFEST_NAME, read_manifest
from k2train.data.verify.chunks import verify_chunks
from k2train.data.verify.folder import verify_folder
from k2train.errors import RunError
from k2train.record.events import Started
from k2train.record.metrics import StepRecord, checked_records
from verify_run_parts.ledger import starts_of
from verify_run_parts.problem import CONFIG, LEDGER, METRICS, Entries, Problem


def check_data(directory: Path, named: str, entries: Entries) -> Iterator[Problem]:
    """Check that the data folder is the run's, and whole.

    Raises UserError when it cannot be read.
    """
    path = Path(named) if named else Path(load_config(str(directory / CONFIG)).data.manifest)

    if not named and not path.is_absolute():
        # The path is relative to where the run was started, which is above its directory.
        above = [base / path for base in directory.resolve().parents]
        path = next(
            (found for found in above if (found / MANIFEST_NAME).is_file() or found.is_file()), path
        )

    manifest = read_manifest(path)
    for line, event in starts_of(entries):
        if isinstance(event, Started) and not manifest.is_named(
            (event.data_manifest_sha256, event.data_content_sha256)
        ):
            yield Problem(
                f"{manifest.path}: is not the data that {directory / LEDGER}, line {line} started "
                "with"
            )

    for report in verify_chunks(manifest, manifest.all_chunks()):
        yield from map(Problem, report.problems)
    yield from map(Problem, verify_folder(manifest))

    # Damaged lines have been told already.
    if (metrics := directory / METRICS).exists():
        records = (record for _, record in checked_records(metrics, StepRecord))
        whole = [record for record in records if not isinstance(record, RunError)]
        yield from map(Problem, fed_problems(manifest, whole))
        if any(record.ids is None for record in whole):
            yield Problem(
                f"{metrics}: steps without a hash of their ids, from an older version, cannot be "
                "compared with the data",
                note=True,
            )
