"""Write or check proofs of a release, a run or an export that other people's programs can read.

    python tools/attest.py DIR --run RUN [--run NEXT_STAGE ...] [--key PRIVATE_KEY]
    python tools/attest.py DIR --check [--public-key FILE] [--formats]
    python tools/attest.py DIR --request FILE
    python tools/attest.py DIR --timestamp TOKEN --tsa-root CERTIFICATES
    python tools/attest.py --new-key FILE

- Writes DIR/proofs: an in-toto statement with SLSA provenance, a CycloneDX bill of materials, a
  Croissant description of the data, the EU summary of training content, and with a key an OpenSSF
  model signature. All of it comes from the record of the runs; what that leaves open is listed.
- `--check` needs nothing but DIR. `--public-key` is the publisher's, known from elsewhere;
  `--formats` also asks the formats' own validators.
- `--request` writes what a time stamp authority wants; `--timestamp` adds its answer (RFC 3161).

Exit codes: 0 done; 2 a check found a problem, or a mistake, one line; 1 the disk refused.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from command_line import Parser, command

from k2train.errors import EXIT_DONE, EXIT_USAGE, UnavailableError
from k2train.proofs.check import check_proofs, key_of
from k2train.proofs.formats import format_problems
from k2train.proofs.keys import key_id, new_key, read_public_key
from k2train.proofs.time_stamp import add_token, write_request
from k2train.proofs.write import write_proofs
from k2train.retry import reason
from k2train.text import counted


@command
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.folder is None and given.new_key is None:
        parser.error("give DIR, or --new-key FILE")
    _check_pairs(parser, given)

    try:
        return _run(given)
    except OSError as error:
        where = error.filename or given.folder or given.new_key
        raise UnavailableError(f"{where} cannot be used: {reason(error, where)}") from None


def _parser() -> Parser:
    parser = Parser(prog="attest.py", description="Write or check proofs of a folder.")
    parser.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="run, export, release")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--run", type=Path, action="append", metavar="RUN", help="what made DIR")
    what.add_argument("--check", action="store_true", help="check the proofs of DIR")
    what.add_argument("--request", type=Path, metavar="FILE", help="write a time stamp request")
    what.add_argument("--timestamp", type=Path, metavar="TOKEN", help="add a time stamp")
    what.add_argument("--new-key", type=Path, metavar="FILE", help="make a private key")
    parser.add_argument("--key", type=Path, metavar="FILE", help="private key that signs, in PEM")
    parser.add_argument("--public-key", type=Path, metavar="FILE", help="key of the publisher")
    parser.add_argument("--formats", action="store_true", help="also the formats' own validators")
    parser.add_argument("--tsa-root", type=Path, metavar="FILE", help="certificates of the token")
    return parser


def _check_pairs(parser: Parser, given: argparse.Namespace) -> None:
    pairs = (
        (given.key, given.run, "--key needs --run"),
        (given.public_key, given.check, "--public-key needs --check"),
        (given.formats, given.check, "--formats needs --check"),
        (given.tsa_root, given.timestamp, "--tsa-root needs --timestamp"),
        (given.timestamp, given.tsa_root, "--timestamp needs --tsa-root: the certificates of it"),
    )
    for one, other, message in pairs:
        if one and not other:
            parser.error(message)
    if not (given.run or given.check or given.request or given.timestamp or given.new_key):
        parser.error("give one of --run, --check, --request, --timestamp and --new-key")


def _run(given: argparse.Namespace) -> int:
    folder = given.folder
    if given.new_key:
        print(f"{given.new_key}: new key {new_key(given.new_key)}; keep it out of what you publish")
    elif given.check:
        return _check(folder, given.public_key, given.formats)
    elif given.request:
        write_request(folder, given.request)
        print(f"{given.request}: send it to a time stamp authority")
    elif given.timestamp:
        time = add_token(folder, given.timestamp, given.tsa_root)
        print(f"{folder}: signed before {time.isoformat()}")
    else:
        points = write_proofs(folder, given.run, given.key)
        key = key_of(folder)
        print(f"{folder}/proofs: " + (f"signed by key {key}" if key else "not signed"))
        print(f"{counted(len(points), 'open point')}:")
        for line in points:
            print(f"  {line}")
    return EXIT_DONE


def _check(folder: Path, public_key: Path | None, formats: bool) -> int:
    expected = None if public_key is None else key_id(read_public_key(public_key))
    problems = check_proofs(folder, expected)
    problems += format_problems(folder) if formats else []
    for line in problems:
        print(line, file=sys.stderr)
    if problems:
        print(f"{folder}: {counted(len(problems), 'problem')}", file=sys.stderr)
        return EXIT_USAGE
    key = key_of(folder)
    print(f"{folder}: ok, " + (f"signed by key {key}" if key else "not signed"))
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
