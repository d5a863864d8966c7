"""Reading a recipe: its YAML and overrides, and every mistake with its line."""

from collections.abc import Sequence

from pydantic import ValidationError

from k2train.commands import program_text
from k2train.config.messages import Problem, legal_keys, nearest, problems_of, unknown
from k2train.config.yaml_source import Mistake, Path, Source, dotted, read_source
from k2train.data.prepare.recipe import Recipe
from k2train.errors import ConfigError


def load_recipe(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe with its `dotted.key=value` overrides.

    Raises ConfigError with every mistake, one per line.
    """
    source = read_source(path, overrides)
    if "model" in source.tree and not {"subsets", "output"} & source.tree.keys():
        raise ConfigError(
            f"{path}: is the config of a run, which {program_text('k2train.train')} takes; a "
            "recipe of data has subsets, an output and a tokenizer"
        )

    mistakes = list(source.mistakes)
    recipe = None

    try:
        recipe = Recipe.model_validate(source.tree)
    except ValidationError as error:
        unknown_subsets = _unknown_subsets(source)
        mistakes += unknown_subsets.values()
        for problem in problems_of(error, _unknown_key):
            # Consequences of a broken value or of an unknown subset are not reported again.
            if problem.path not in source.broken and problem.path[:2] not in unknown_subsets:
                mistakes.append(_mistake(source, problem))

    if mistakes or recipe is None:
        raise ConfigError("\n".join(dict.fromkeys(map(str, mistakes))))
    return recipe


def _unknown_key(path: Path) -> str:
    legal = legal_keys(Recipe, path[:-1])
    return unknown(nearest(str(path[-1]), legal), legal)


def _mistake(source: Source, problem: Problem) -> Mistake:
    """Locate a problem: an override that may have caused it, else the line of the file."""
    written = [source.origins[path] for path in problem.causes if path in source.origins]
    # An override of one of the causes is reported first.
    overridden = [origin for origin in written if origin.override]
    origin = (overridden or written or [source.origin_of(problem.path)])[0]
    where = f"{dotted(problem.path)}: " if problem.path else ""
    return Mistake(origin, where + problem.message)


def _unknown_subsets(source: Source) -> dict[Path, Mistake]:
    """Subsets named only by an override and without a kind: taken as misspelled names."""
    subsets = source.tree.get("subsets")
    subsets = subsets if isinstance(subsets, dict) else {}
    paths = {name: ("subsets", name) for name in subsets}
    mistyped = {
        name: origin
        for name, path in paths.items()
        if (origin := source.origins.get(path))
        and origin.override
        and (*path, "kind") not in source.origins
    }

    known = [name for name in subsets if name not in mistyped]
    found: dict[Path, Mistake] = {}
    for name, origin in mistyped.items():
        similar = nearest(name, known)
        hint = (
            f"nearest is {similar}" if similar else f"the recipe has {', '.join(known) or 'none'}"
        )
        found[paths[name]] = Mistake(origin, f"subsets.{name}: no such subset; {hint}")

    return found
