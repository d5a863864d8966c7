"""Preparation of chat data: conversations in, a data folder with loss masks out.

- The same conversations, template, tokenizer and seed give the same bytes, in whatever order the
  files are named or hold them.
- The folder appears complete, by a rename. A start that was killed leaves `OUTPUT.tmp` and
  `OUTPUT.work`, which the next start removes.
- What is not used is counted, and listed in `rejected.jsonl` with file, line and reason.

Alternatives considered:
- A kind of source in a recipe of `prepare_data`: its documents are texts that flow from row to row,
  and a conversation has parts that are learned and parts that are not.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from k2train.chat.account import Account
from k2train.chat.base_tokenizer import base_tokenizer, with_markers
from k2train.chat.conversation import Conversation, conversation_of
from k2train.chat.encode import ChatEncoder, Learn
from k2train.chat.pack import pack
from k2train.chat.sources import Item, SourceReader, list_sources
from k2train.chat.spool import Origin, Spool
from k2train.chat.template import ChatTemplate, TemplateSource
from k2train.chat.write_rows import RowWriter
from k2train.data.chunk import ChunkInfo
from k2train.data.load_tokenizer import save_tokenizer
from k2train.data.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from k2train.data.prepare.progress import Progress
from k2train.data.prepare.run.executor import exclusive
from k2train.data.prepare.run.publish import damaged, is_data_folder, swap_in
from k2train.data.prepare.source import Source
from k2train.data.prepare.sources.rejected import REJECTED_NAME
from k2train.data.prepare.write.provenance import require_pyarrow
from k2train.data.tokenizer import Tokenizer
from k2train.errors import DataError
from k2train.files import AtomicFile, remove_empty, sha256_file
from k2train.retry import exists_retried, is_file_retried, is_folder_retried
from k2train.text import counted

TEMPLATE_NAME = "chat_template.jinja"
VERSION = 1
"""Goes up when the same settings give other bytes."""
UNREADABLE, BROKEN = "lines that cannot be read", "conversations that break a rule"
UNRENDERED, TOO_LONG = "conversations that the template refuses", "conversations longer than a row"
COPIES = "copies of a conversation that was there before"


@dataclass(frozen=True)
class ChatSettings:
    """What a preparation is asked for; `template` is k2 or a file of Jinja."""

    inputs: tuple[str, ...]
    output: Path
    tokenizer: Path
    sequence_length: int
    template: str = "k2"
    learn: Learn = "responses"
    chunks: int = 1
    epochs: int = 1
    held_out_rows: int = 0
    system: str = ""
    specials: tuple[str, ...] = ()
    seed: int = 1


class ChatPreparation:
    """One preparation. Raises DataError for a tokenizer, template or input that cannot be used."""

    def __init__(self, settings: ChatSettings, progress: Progress) -> None:
        require_pyarrow()
        self.settings, self.progress, self.account = settings, progress, Account()
        self.source = TemplateSource.read(settings.template)
        names = (*self.source.specials, *settings.specials)
        self.tokenizer = with_markers(base_tokenizer(settings.tokenizer), names)
        self.encoder = ChatEncoder(ChatTemplate(self.source, self.tokenizer), settings.learn)
        # By name, so that the order of the command line does not matter.
        self.files = sorted(list_sources(settings.inputs), key=lambda source: source.key)
        _check_names(self.files)

    def run(self, force: bool = False) -> tuple[Manifest, bool]:
        """Make the data folder, or find it made; returns it and whether it was made now.

        Raises DataError for a folder of something else, unless `force` replaces it.
        """
        output = self.settings.output
        if (existing := self._existing(force)) is not None:
            return existing, False
        target = output.with_name(f"{output.name}.tmp")
        with _workspace(output.with_name(f"{output.name}.work"), target) as work:
            with Spool(work / "spool", self.settings.seed) as spool:
                with AtomicFile(target / REJECTED_NAME) as rejected:
                    hashes = self._read(spool, rejected)
                spool.close()
                chunks, held_out = self._write(spool, target, work / "pieces")
            self._publish(target, chunks, held_out, hashes)
            swap_in(target, output)
        return read_manifest(output), True

    def _existing(self, force: bool) -> Manifest | None:
        """The manifest of the output if it is what would be made. Raises DataError."""
        output = self.settings.output
        if not exists_retried(output):
            return None
        if not is_data_folder(output):
            raise DataError(
                f"--to: {output} exists and is not a data folder; name another, or move it away"
            )
        if force or not is_file_retried(output / MANIFEST_NAME):
            return None
        before = read_manifest(output)
        hashes = [sha256_file(Path(source.path)) for source in self.files]
        if before.facts.chat is None or before.facts.chat.identity != self._identity(hashes):
            raise DataError(
                f"--to: {output} holds other data: name another, or give --force to replace it"
            )
        if broken := damaged(before):
            raise DataError(
                f"--to: {output}: {broken[0]} is missing or damaged; --force makes it anew"
            )
        return before

    def _identity(self, hashes: Sequence[str]) -> str:
        """Hash of all that decides the folder's bytes; `hashes` are those of the sources."""
        asked = asdict(self.settings)
        for name in ("inputs", "output", "tokenizer", "template"):
            del asked[name]
        content = {
            "version": VERSION,
            **asked,
            "template": hashlib.sha256(self.source.text.encode()).hexdigest(),
            "tokenizer": self.tokenizer.sha256,
            "sources": [[s.key, digest] for s, digest in zip(self.files, hashes, strict=True)],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _read(self, spool: Spool, rejected: Any) -> list[str]:
        """Read, encode and spool all conversations; returns the hashes of the sources."""
        hashes = []
        for number, source in enumerate(self.progress.track("read", self.files, unit="file")):
            reader = SourceReader(source)
            for item in reader:
                self.account.read += 1
                kind, reason = self._take(spool, item, Origin(number, item.line))
                if not kind:
                    self.account.conversations += 1
                    continue
                self.account.leave_out(kind, f"{source.path}:{item.line}", reason)
                entry = {"file": source.key, "line": item.line, "kind": kind, "why": reason}
                rejected.write((json.dumps(entry) + "\n").encode())
            hashes.append(reader.sha256)
        return hashes

    def _take(self, spool: Spool, item: Item, origin: Origin) -> tuple[str, str]:
        """Spool one record; returns why not, as kind and reason, or ("", "")."""
        if item.problem:
            return UNREADABLE, item.problem
        try:
            conversation = conversation_of(item.record).with_system(self.settings.system)
        except DataError as error:
            return BROKEN, str(error)
        try:
            encoded = self.encoder.encode(conversation.messages)
        except DataError as error:
            return UNRENDERED, str(error)
        room = self.settings.sequence_length
        if len(encoded.ids) > room:
            return TOO_LONG, f"has {len(encoded.ids)} tokens, a row {room}"
        if not spool.add(encoded, origin):
            return COPIES, "has the ids of an earlier one"
        self._count(conversation, origin)
        return "", ""

    def _count(self, conversation: Conversation, origin: Origin) -> None:
        self.account.cut += conversation.cut
        control = self.encoder.template.control
        if any(control.forged(message.content) for message in conversation.messages):
            self.account.note_forged(f"{self.files[origin.source].path}:{origin.line}")

    def _write(
        self, spool: Spool, target: Path, scratch: Path
    ) -> tuple[list[ChunkInfo], ChunkInfo | None]:
        """Pack the conversations and write the chunks. Raises DataError for too few rows."""
        settings, account = self.settings, self.account
        rows, held_out_rows = pack(
            spool.lengths,
            spool.keys,
            settings.sequence_length,
            settings.held_out_rows,
            settings.epochs,
        )
        if len(rows) < settings.chunks:
            raise DataError(self._too_few(len(rows) + len(held_out_rows)))

        scratch.mkdir()
        writer = RowWriter(
            target,
            scratch,
            spool,
            tuple(source.key for source in self.files),
            settings.sequence_length,
            self.tokenizer.vocab_size,
            self.tokenizer.eos_id if self.tokenizer.pad_id is None else self.tokenizer.pad_id,
        )
        account.rows, account.held_out_rows = len(rows), len(held_out_rows)
        account.tokens = (len(rows) + len(held_out_rows)) * settings.sequence_length
        filled = (spool.lengths[row.conversations].sum() for row in (*rows, *held_out_rows))
        account.padding = account.tokens - int(sum(filled))
        width = max(3, len(str(settings.chunks - 1)))
        bounds = [len(rows) * n // settings.chunks for n in range(settings.chunks + 1)]
        parts = [rows[first:end] for first, end in pairwise(bounds)]
        numbered = self.progress.track("write", list(enumerate(parts)), unit="chunk")
        chunks = [writer.write(f"chunk_{n:0{width}d}", part) for n, part in numbered]
        held_out = writer.write("held_out", held_out_rows) if held_out_rows else None
        account.targets = sum(info.targets or 0 for info in (*chunks, held_out) if info)
        return chunks, held_out

    def _too_few(self, rows: int) -> str:
        settings = self.settings
        if rows:
            return (
                f"{counted(self.account.conversations, 'conversation')} come to "
                f"{counted(rows, 'row')} of "
                f"{settings.sequence_length} tokens, too few for --chunks {settings.chunks} and "
                f"--held-out {settings.held_out_rows}: lower them, or --sequence-length"
            )
        examples = [line for lines in self.account.examples.values() for line in lines]
        why = f"; the first: {examples[0]}" if examples else ""
        if not self.account.read:
            return f"no record in {', '.join(self.settings.inputs)}: name other files"
        return f"none of {self.account.read} records is a conversation that can be used{why}"

    def _publish(
        self,
        target: Path,
        chunks: Sequence[ChunkInfo],
        held_out: ChunkInfo | None,
        hashes: Sequence[str],
    ) -> None:
        """Write tokenizer and template, and the manifest last."""
        save_tokenizer(target, self.tokenizer)
        text = self.source.text.encode()
        with AtomicFile(target / TEMPLATE_NAME) as stream:
            stream.write(text)
        chat = {
            "template": self.source.kind,
            "file": TEMPLATE_NAME,
            "sha256": hashlib.sha256(text).hexdigest(),
            "learn": self.settings.learn,
            "identity": self._identity(hashes),
            **self.account.facts,
        }
        facts: dict[str, Any] = {
            "name": self.settings.output.name,
            "seed": self.settings.seed,
            "rejected_sha256": sha256_file(target / REJECTED_NAME),
            "tokenizer": _tokenizer_facts(self.tokenizer),
            "chat": chat,
        }
        write_manifest(
            target,
            tokenizer_sha256=self.tokenizer.sha256,
            sequence_length=self.settings.sequence_length,
            vocab_size=self.tokenizer.vocab_size,
            chunks=chunks,
            held_out=held_out,
            facts=facts,
        )


def _tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    return {"file": next(iter(tokenizer.files)), **tokenizer.facts}


def _check_names(files: Sequence[Source]) -> None:
    """Raises DataError for two files with one name."""
    for before, after in pairwise(files):
        if before.key == after.key:
            raise DataError(
                f"{before.path} and {after.path} would both be {after.key}: rename one, since "
                "origins are recorded by folder and name"
            )


@contextmanager
def _workspace(work: Path, target: Path) -> Iterator[Path]:
    """Make the work folder and an empty target for one start; both are gone at its end."""
    made = [one for one in work.parents if not exists_retried(one)]
    work.mkdir(parents=True, exist_ok=True)
    with exclusive(work):
        for left in (work / "pieces", target):
            if is_folder_retried(left):
                shutil.rmtree(left)
        target.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(target, ignore_errors=True)
            shutil.rmtree(work, ignore_errors=True)
            remove_empty(made)
