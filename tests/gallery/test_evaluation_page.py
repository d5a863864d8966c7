"""Page of evaluations in a browser: numbers of each choice, right or wrong, compare, search."""

import math
from collections.abc import Iterator

import pytest

from k2train.gallery.build import read_content, write_gallery
from tests.support.devtools import Page
from tests.support.tiny_gallery import choice_item, make_result, said_item

ITEMS, CHECKPOINTS = 60, 4
SHOWN = "document.querySelector('#shown h2')?.innerText"
EVIL = "__proto__ <img src=x onerror=boom()> \u202e"


def likelihoods(checkpoint: int, number: int) -> list[float]:
    """Item 0 becomes right at checkpoint 2, item 1 becomes wrong there, the others stay."""
    rises = [-3.0, -2.0 if checkpoint < 2 else -4.0]
    return {0: rises, 1: rises[::-1]}.get(number, [-1.0, -1.0 - number])


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    base = tmp_path_factory.mktemp("evaluation")
    for c in range(CHECKPOINTS):
        items = [choice_item(n, 0, likelihoods(c, n)) for n in range(ITEMS)]
        items[55] = choice_item(55, 0, likelihoods(c, 55), prompt=f"a rare word {EVIL}")
        items[58] = choice_item(58, 0, [-1.0, -math.inf])
        make_result(base / "run", "quiz", c, items)
        texts = [f"it is {c // 2}", f"{EVIL}{c}"]
        make_result(base / "run", "sums", c, [said_item(n, texts, float(c > 1)) for n in range(3)])
        make_result(base / "run", EVIL[:9], c, [said_item(0, ["x"], 0.0)])
    content = read_content(base / "run", None, None)
    write_gallery(base / "site", content, lambda texts: {})
    return (base / "site" / "evaluation.html").as_uri()


@pytest.fixture
def shown(page: Page, address: str) -> Iterator[Page]:
    page.problems.clear()
    page.asked.clear()
    page.look(1200, 800)
    page.open(f"{address}#task=quiz")
    page.until(SHOWN)
    yield page
    assert page.problems == []
    folder = address.rpartition("/")[0]
    assert page.asked and all(one.startswith((folder, "about:", "data:")) for one in page.asked)


def cells(page: Page) -> list[list[str]]:
    return list(
        page.run(
            "[...document.querySelectorAll('.choices tr')].map(r => [...r.cells].map(c => "
            "c.querySelector('meter')?.value.toFixed(3) ?? c.innerText.trim()))"
        )
    )


def columns(page: Page) -> list[str]:
    return list(page.run("[...document.querySelectorAll('.column')].map(e => e.innerText)"))


def show(page: Page, name: str) -> str:
    page.run(
        f"{{ const s = document.querySelector('#show'); s.value = '{name}'; "
        "s.dispatchEvent(new Event('change')) }"
    )
    return page.text("#status")


def test_each_choice_has_its_numbers(shown: Page) -> None:
    """Catches numbers of another choice or checkpoint, and the wrong one marked."""
    first, last = columns(shown)
    assert first.startswith("A: ckpt_000 wrong") and last.startswith("B: ckpt_003 right")
    # Shares are those of exp(log-likelihood): 1 / (1 + e) and its rest.
    assert cells(shown) == [
        ["right", "choice 0", "-3.00", "0.269"],
        ["chosen", "choice 1", "-2.00", "0.731"],
        ["chosen, right", "choice 0", "-3.00", "0.731"],
        ["", "choice 1", "-4.00", "0.269"],
    ]
    assert shown.run("document.querySelectorAll('#shown polyline').length") == 2
    strip = shown.run("[...document.querySelectorAll('.strip button')].map(e => e.title)")
    assert [one.rpartition(": ")[2] for one in strip] == ["wrong", "wrong", "right", "right"]


def test_a_choice_of_probability_zero_is_shown(shown: Page, address: str) -> None:
    """Catches a page that stops at a logarithm of zero, and a share that is no number."""
    shown.open(f"{address}#task=quiz&item=59")
    shown.until(SHOWN)
    assert cells(shown)[:2] == [
        ["chosen, right", "choice 0", "-1.00", "1.000"],
        ["", "choice 1", "-∞", "0.000"],
    ]


def test_scores_of_the_task(shown: Page) -> None:
    """Catches a score under another checkpoint."""
    shown.run("document.querySelector('#scores details').open = true")
    shown.until("document.querySelector('#scores table')")
    told = shown.text("#scores table").replace("\t", " ").splitlines()
    assert told[0] == "checkpoint step acc"
    assert told[1:] == [f"ckpt_{c:03d} {10 * c} 0.983" for c in range(CHECKPOINTS)]


@pytest.mark.parametrize(
    "name, count",
    (("all", 60), ("right", 59), ("wrong", 1), ("changed", 2), ("better", 1), ("worse", 1)),
)
def test_filters(shown: Page, name: str, count: int) -> None:
    """Catches a filter that looks at another checkpoint."""
    assert show(shown, name).startswith(f"{count} of 60 items")
    title = {"wrong": "Item 2", "worse": "Item 2", "better": "Item 1"}.get(name)
    if title:
        shown.until(f"{SHOWN}.startsWith('{title} ')")


def test_keys_move_items_and_checkpoints(shown: Page) -> None:
    """Catches keys of the other page that this one lacks, and filters that stay behind."""
    show(shown, "changed")
    shown.press("j")
    shown.until(f"{SHOWN} === 'Item 2 of 60: item_1'")
    for _ in range(2):
        shown.press("ArrowLeft")
    shown.until("document.querySelector('#status').innerText.startsWith('0 of 60')")
    shown.press("ArrowRight")
    shown.until("document.querySelector('#status').innerText.startsWith('2 of 60')")
    hash_ = shown.run("location.hash")
    assert hash_ == "#task=quiz&item=2&a=ckpt_000&b=ckpt_002&show=changed"


def test_search_reaches_items_that_were_never_shown(shown: Page) -> None:
    """Catches a search of what is loaded."""
    shown.press("/")
    shown.type("RARE word")
    shown.until(f"{SHOWN} === 'Item 56 of 60: item_55'")
    assert shown.text("#status").startswith("1 of 60") and shown.text(".prompt .hit") == "rare word"
    assert shown.run("document.images.length") == 0
    assert "\\u202e" in shown.text(".prompt")


def test_a_link_opens_a_generated_answer(shown: Page, address: str) -> None:
    """Catches samples that are mixed up, and a difference between two other samples."""
    shown.open(f"{address}#task=sums&item=2&a=ckpt_001&b=ckpt_002")
    shown.until(f"{SHOWN} === 'Item 2 of 3: sum_1'")
    first, last = columns(shown)
    assert "Sample 1" in first and "it is 0" in first and "it is 1" in last
    marked = shown.run("[...document.querySelectorAll('.added, .removed')].map(e => e.innerText)")
    assert marked == ["0", "1", "1", "2"]
    shown.run(
        "{ const s = document.querySelector('#task'); s.value = '0'; "
        "s.dispatchEvent(new Event('change')) }"
    )
    shown.until(f"{SHOWN} === 'Item 1 of 1: sum_0'")
    assert [one.split()[1] for one in columns(shown)] == ["ckpt_001", "ckpt_002"]
    assert shown.run("location.hash").startswith("#task=__proto__&item=1")


def test_it_fits_a_phone(shown: Page) -> None:
    """Catches a table of choices that is wider than a phone."""
    shown.look(390, 900, phone=True)
    shown.until("innerWidth === 390")
    assert shown.run("document.documentElement.scrollWidth") <= 390


def test_only_rows_in_sight_are_in_the_page(shown: Page, address: str) -> None:
    """Catches a list of 14,000 items that is built whole, and one that does not come to its row."""
    count = "document.querySelectorAll('.row').length"
    assert 5 < shown.run(count) < 40
    shown.open(f"{address}#task=quiz&item=60")
    shown.until("document.querySelector('[aria-selected=true] .number')?.innerText === '60'")
    assert 5 < shown.run(count) < 40
    row = "document.querySelector('[aria-selected=true]').getBoundingClientRect()"
    box = "document.querySelector('#list').getBoundingClientRect()"
    assert shown.run(f"{row}.top >= {box}.top - 1 && {row}.bottom <= {box}.bottom + 1")
