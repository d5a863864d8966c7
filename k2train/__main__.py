"""The `k2train` command: one name for the trainer, the launcher and all tools.

    k2train COMMAND [ARGUMENTS ...]
    python -m k2train COMMAND [ARGUMENTS ...]

- Runs the program in this process, as Python runs a script or `-m`: exit codes, signals and errors
  are those of `python tools/NAME.py` and `python -m k2train.train`.
- `k2train.commands` is the table of commands.

Alternatives considered:
- Importing all tools for one parser with sub-commands: `--help` would import everything.
"""

import argparse
import difflib
import runpy
import sys
from collections.abc import Sequence

import k2train
from k2train.command_line import Parser, readers_may_leave, show_any_character
from k2train.commands import COMMANDS, GROUPS, start_as, tools_folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name, and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    show_any_character()
    with readers_may_leave():
        name = _command_of(given[:1])
    return run(name, given[1:])


def run(name: str, arguments: Sequence[str]) -> int:
    """Run a command of the table in this process. A program that ends by `sys.exit` does so."""
    program = COMMANDS[name].program
    start_as(name)
    sys.argv = [f"k2train {name}", *arguments]
    if "." in program:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
        return 0

    # The folder of a script is on the import path; that of this command need not be.
    folder = str(tools_folder())
    if sys.flags.safe_path:
        sys.path.insert(0, folder)
    else:
        sys.path[0] = folder
    runpy.run_path(f"{folder}/{program}.py", run_name="__main__")
    return 0


def _command_of(first: Sequence[str]) -> str:
    """Parse the first argument. Exits with one line for a command that is not there."""
    parser = Parser(
        prog="k2train",
        usage="k2train COMMAND [ARGUMENTS ...]",
        description=_overview(),
        epilog="k2train COMMAND --help describes a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"k2train {k2train.__version__}")
    name = str(parser.parse_args(first).command)

    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1, cutoff=0.5)
        parser.error(
            f"there is no command {name}{f'; nearest is {near[0]}' if near else ''}"
            if not name.endswith((".yaml", ".yml"))
            else f"{name} is a config; write k2train train {name}"
        )
    return name


def _overview() -> str:
    """List all commands by what they are for."""
    width = max(map(len, COMMANDS))
    lines = ["Pretraining of LLaMA-style language models.", ""]
    for group, commands in GROUPS.items():
        lines.append(f"{group}:")
        lines += [f"  {name:<{width}}  {command.summary}" for name, command in commands.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
