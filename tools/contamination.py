"""Contamination: which test items a run has read, at which step, and what that did to the scores.

    python tools/contamination.py RUN --tasks A,B|all [--metric acc]      items of results
    python tools/contamination.py RUN --items FILE.jsonl [--key KEY]      items of a file

- RUN is a run directory, or a data folder: then there are places, but no steps and no scores.
- Items of results are in RUN/evaluation. Their scores before and after the step of exposure stand
  side by side, and RUN/evaluation/contamination.json has it all (--to FILE: elsewhere).
- The search index is built on demand, as by trace.py. Needs no torch.

Exit codes: 0 done; 2 an error in usage, data, run or items, one line on stderr.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from command_line import Parser, command, positive
from recorded_run import corpora_of, indexes_of

from k2train.data.inspect.account import find_tokenizer
from k2train.data.trace.findings import Corpus
from k2train.errors import EXIT_DONE, RunError, UserError
from k2train.evaluation.contamination import Contamination
from k2train.evaluation.contamination_findings import Rules
from k2train.evaluation.contamination_items import items_of_result, read_test_items
from k2train.evaluation.contamination_report import (
    FILE,
    TaskFinding,
    facts_of,
    file_facts,
    lines_of,
    write_facts,
)
from k2train.evaluation.exposed_scores import exposed_scores, metric_of
from k2train.evaluation.results import (
    FOLDER,
    Item,
    TaskResult,
    is_of_other_weights,
    read_items,
    read_results,
)
from k2train.files import sha256_file
from k2train.retry import reason

ALL = "all"


def _parser() -> Parser:
    parser = Parser(prog="contamination", description="Find test items in what a run has read.")
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory, or a data folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--tasks", metavar="A,B", help="tasks that were evaluated, or all")
    source.add_argument("--items", type=Path, metavar="FILE", help="items, a JSON object a line")
    parser.add_argument("--key", help="with --items: key of a text, in place of prompt and target")
    parser.add_argument("--metric", help="with --tasks: the score that is compared")
    rules = Rules()
    parser.add_argument(
        "--tokens", type=positive, default=rules.tokens, help=f"shortest span ({rules.tokens})"
    )
    parser.add_argument(
        "--least-tokens",
        type=positive,
        default=rules.least_tokens,
        help=f"shortest part that is judged ({rules.least_tokens})",
    )
    parser.add_argument(
        "--exposed",
        type=float,
        default=rules.exposed,
        help=f"covered share of exposed items ({rules.exposed})",
    )
    parser.add_argument(
        "--clean", type=float, default=rules.clean, help=f"that of clean ones ({rules.clean})"
    )
    parser.add_argument("--show", type=positive, default=20, help="items in the table (20)")
    parser.add_argument("--data", type=Path, help="the run's data folder, if it has moved")
    parser.add_argument("--folder", type=Path, metavar="F", help="where the search index is")
    parser.add_argument("--tokenizer", type=Path, help="if it is no longer beside the data")
    parser.add_argument("--to", type=Path, metavar="FILE", help="write the JSON file here")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


@command
def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    rules = Rules(options.tokens, options.least_tokens, options.exposed, options.clean)
    wanted = _results(options)
    file_items = read_test_items(options.items, options.key) if options.items else []

    corpora, notes = corpora_of(options.run, options.data)
    tokenizer = find_tokenizer(corpora[0].manifest, options.tokenizer)
    if tokenizer is None:
        raise UserError(
            f"{corpora[0].manifest.folder} has no tokenizer with the hash of the data; give one as "
            "--tokenizer FILE"
        )
    search = Contamination(corpora, indexes_of(corpora, options.folder), tokenizer, rules)
    tasks = [_task(search, name, own, options.metric) for name, own in wanted.items()]
    if options.items:
        found = search.find(file_items)
        source = {"file": options.items.name, "sha256": sha256_file(options.items)}
        tasks.append(TaskFinding(options.items.name, source, tuple(found), None))

    notes += [f"{one.manifest.folder}: {note}" for one in corpora for note in one.notes]
    _write(options, corpora, rules, tasks, notes)
    return EXIT_DONE


Results = list[tuple[TaskResult, list[Item]]]


def _results(options: argparse.Namespace) -> dict[str, Results]:
    """Results of the tasks asked for, with their items. Raises RunError."""
    if options.tasks is None:
        return {}
    # A group of tasks has no items of its own.
    found = [one for one in read_results(options.run) if one.items]
    there = [one for one in found if not is_of_other_weights(options.run, one)]
    for one in found:
        if one not in there:
            print(
                f"note: {one.checkpoint} on {one.task} left out: it was saved again since; "
                "evaluate it again",
                file=sys.stderr,
            )
    names = sorted({one.task for one in there})
    wanted = names if options.tasks == ALL else [one.strip() for one in options.tasks.split(",")]
    if missing := [name for name in wanted if name not in names]:
        raise RunError(
            f"--tasks: {options.run / FOLDER} has no result of {missing[0]!r:.60}; it has "
            f"{', '.join(names) or 'none'}"
        )
    if not wanted:
        raise RunError(f"{options.run / FOLDER} has no result; evaluate the run, or give --items")
    return {
        name: [(one, read_items(options.run, one)) for one in there if one.task == name]
        for name in wanted
    }


def _task(search: Contamination, name: str, results: Results, metric: str | None) -> TaskFinding:
    """Search the items of the newest result with most of them, and compare scores."""
    newest, items = max(results, key=lambda pair: (pair[0].items, pair[0].step))
    prompts = {item.item: item.prompt_sha256 for item in items}
    same, notes = [], []
    for result, own in results:
        if all(prompts.get(item.item) == item.prompt_sha256 for item in own):
            same.append((result, own))
        else:
            notes.append(f"{result.checkpoint} was asked other prompts and is left out")
    found = search.find(items_of_result(newest, items))
    source = {
        "checkpoint": newest.checkpoint,
        "version": newest.version,
        "harness": newest.harness,
        "items_sha256": newest.items_sha256,
    }
    scores = None
    if search.has_steps:
        scores = exposed_scores(same, found, metric_of(newest, items, metric))
    return TaskFinding(name, source, tuple(found), scores, tuple(notes))


def _write(
    options: argparse.Namespace,
    corpora: Sequence[Corpus],
    rules: Rules,
    tasks: Sequence[TaskFinding],
    notes: Sequence[str],
) -> None:
    facts = _facts(options.run, corpora, rules, tasks)
    # What was searched for a file is printed; that of results belongs to them.
    default = options.run / FOLDER / FILE if options.tasks else None
    place = options.to or default
    if options.json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        for number, task in enumerate(tasks):
            print("\n".join([*([""] if number else []), *lines_of(task, rules, options.show)]))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if place is not None:
        try:
            write_facts(place, facts)
        except OSError as error:
            raise UserError(f"{place}: {reason(error, place)}; name another with --to") from None
        print(f"written to {place}", file=sys.stderr)


def _facts(
    run: Path, corpora: Sequence[Corpus], rules: Rules, tasks: Sequence[TaskFinding]
) -> dict[str, Any]:
    data = [
        {"folder": str(one.manifest.folder), "manifest_sha256": one.manifest.sha256}
        for one in corpora
    ]
    own = [stage for corpus in corpora for stage in corpus.stages if not stage.branch]
    done = own[0].run.history.done_step if own else 0
    return file_facts(run.resolve().name, done, data, rules, [facts_of(one) for one in tasks])


if __name__ == "__main__":
    sys.exit(main())
