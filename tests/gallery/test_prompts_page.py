"""Page of prompts in a real browser: search, filter, compare, keys, links, and hostile text."""

from collections.abc import Iterator

import pytest

from k2train.gallery.build import read_content, write_gallery
from tests.support.devtools import Page
from tests.support.tiny_gallery import make_answers

CHECKPOINTS = 6
PROMPTS = ["the cat", "a dog", "prompt with a NEEDLE", "def f("]
SHOWN = "document.querySelector('#shown h2')?.innerText"
HOSTILE = "</script><img src=x onerror=boom()> \"'`${1}\\ \x00\u202eevil\u2066 &lt; \u2028"


def say(checkpoint: int, prompt: int) -> str:
    if prompt == 1:
        return "always the same"
    if prompt == 3:
        return HOSTILE + f"{checkpoint} \U0001f600"
    return f"the {'old' if checkpoint < 3 else 'new'} word of {prompt}, {checkpoint // 2}" + (
        " hidden treasure" if (checkpoint, prompt) == (2, 0) else ""
    )


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    base = tmp_path_factory.mktemp("prompts")
    asked = make_answers(base / "run", CHECKPOINTS, PROMPTS, say)
    span = {"tokens": 9, "first": 7, "last": 15, "count": 3}
    row = {"chunk": "chunk_007", "row": 41, "data": "data/x", "documents": ["web: f:d"]}
    span["places"] = [{**row, "uses": ["one step 34: trained"]}]
    spans = {"always the same": [span], say(0, 0): []}
    content = read_content(base / "run", asked, None)
    write_gallery(base / "site", content, lambda texts: spans)
    return (base / "site" / "prompts.html").as_uri()


@pytest.fixture
def shown(page: Page, address: str) -> Iterator[Page]:
    """The page, freshly loaded; it must have asked for nothing else and have said nothing."""
    page.problems.clear()
    page.asked.clear()
    page.look(1200, 800)
    page.open(address)
    page.until(SHOWN)
    yield page
    assert page.problems == []
    folder = address.rpartition("/")[0]
    assert page.asked and all(one.startswith((folder, "about:", "data:")) for one in page.asked), (
        page.asked
    )


def titles(page: Page) -> list[str]:
    return list(page.run("[...document.querySelectorAll('.column h3')].map(e => e.innerText)"))


def fragment(page: Page) -> str:
    return str(page.run("location.hash"))


def rows(page: Page) -> list[str]:
    return list(page.run("[...document.querySelectorAll('.row .text')].map(e => e.innerText)"))


def test_first_and_last_side_by_side(shown: Page) -> None:
    """Catches an answer under the wrong checkpoint, and differences that are not marked."""
    assert titles(shown) == ["A: ckpt_000 step 0", "B: ckpt_005 step 50"]
    said = shown.run("[...document.querySelectorAll('.column .said')].map(e => e.innerText)")
    assert said == [say(0, 0), say(5, 0)]
    marked = shown.run("[...document.querySelectorAll('.added, .removed')].map(e => e.innerText)")
    assert marked[:4] == ["old", "0", "new", "2"]
    new = "[...document.querySelectorAll('.entry .added:not(.blank)')].map(e => e.textContent)"
    shown.until(f"{new}.join(' ') === '1 hidden treasure new 2'")
    # Answers of neighbours that say the same share an entry.
    entries = shown.run("[...document.querySelectorAll('.entry h3')].map(e => e.innerText)")
    assert entries[0] == "ckpt_000 to ckpt_001 2 checkpoints" and len(entries) == 4


def test_keys(shown: Page) -> None:
    """Catches a key that does nothing, one that goes beyond the end, and one that types."""
    shown.press("j")
    shown.until(f"{SHOWN} === 'Prompt 2 of 4'")
    for key in ("k", "k"):
        shown.press(key)
    shown.until(f"{SHOWN} === 'Prompt 1 of 4'")
    shown.press("ArrowLeft")
    shown.until("document.querySelectorAll('.column h3')[1].innerText.includes('ckpt_004')")
    shown.press("ArrowRight", shift=True)
    shown.until("document.querySelectorAll('.column h3')[0].innerText.includes('ckpt_001')")
    assert fragment(shown) == "#prompt=1&a=ckpt_001&b=ckpt_004"
    assert shown.run("document.querySelector('#column_b').value") == "4"

    shown.press("?")
    assert shown.run("document.querySelector('dialog').open") is True
    shown.press("Escape")
    assert shown.run("document.querySelector('dialog').open") is False
    shown.press("/")
    assert shown.run("document.activeElement.id") == "search"
    shown.press("j")
    assert shown.run("document.querySelector('#search').value") == "j"
    shown.press("Escape")
    assert shown.run("document.activeElement.id + document.querySelector('#search').value") == ""
    shown.press("d")
    shown.until("!document.querySelector('.added')")
    assert fragment(shown).endswith("&mark=off")


def test_search_finds_prompts_and_answers(shown: Page) -> None:
    """Catches an answer that is found only once it was opened, and one lost to its case."""
    shown.press("/")
    shown.type("TREASURE")
    shown.until("document.querySelector('#status').innerText.includes('1 distinct answers')")
    assert rows(shown) == ["the cat"]
    shown.until("document.querySelector('.entry .hit')")
    assert shown.text(".entry .hit") == "treasure"
    shown.run("document.querySelector('#search').select()")
    shown.type("needle")
    shown.until(f"{SHOWN} === 'Prompt 3 of 4'")
    assert rows(shown) == ["prompt with a NEEDLE"] and shown.text(".prompt .hit") == "NEEDLE"
    shown.run("document.querySelector('#search').select()")
    shown.type("(.*[")
    shown.until("document.querySelector('#shown').innerText.includes('No prompt is left')")


def test_filters_follow_the_columns(shown: Page) -> None:
    """Catches a filter of other checkpoints than those that are shown."""
    pick = "const s = document.querySelector('#show'); s.value = '{}'; "
    pick += "s.dispatchEvent(new Event('change'))"
    shown.run(f"{{ {pick.format('same')} }}")
    assert rows(shown) == ["a dog"]
    shown.until(f"{SHOWN} === 'Prompt 2 of 4'")
    shown.run(f"{{ {pick.format('changed')} }}")
    assert rows(shown) == ["the cat", "prompt with a NEEDLE", "def f("]
    # The last column goes back to where the first prompt's answer was the same.
    for _ in range(4):
        shown.press("ArrowLeft")
    assert rows(shown) == ["def f("]
    shown.run(f"{{ {pick.format('missing')} }}")
    shown.until("document.querySelector('#shown').innerText.includes('No prompt is left')")


def test_what_was_asked_last_is_shown(shown: Page) -> None:
    """Catches a text that comes late and replaces what was asked after it."""
    shown.run(
        "{ const load = gallery.load; gallery.load = name => new Promise(done => "
        "{ window.arrives = () => done(load(name)) }) }"
    )
    shown.press("ArrowLeft")
    shown.run(
        "{ const s = document.querySelector('#show'); s.value = 'missing'; "
        "s.dispatchEvent(new Event('change')) }"
    )
    shown.run("window.arrives(), new Promise(done => setTimeout(done))")
    assert "No prompt is left" in shown.text("#shown")


def test_a_link_leads_to_what_was_seen(shown: Page, address: str) -> None:
    """Catches a link that opens another prompt or checkpoint, and one that an edit breaks."""
    shown.open(f"{address}#prompt=3&a=ckpt_002&b=ckpt_004&c=ckpt_001&q=word")
    shown.until(f"{SHOWN} === 'Prompt 3 of 4'")
    assert [one.split()[1] for one in titles(shown)] == ["ckpt_002", "ckpt_004", "ckpt_001"]
    assert shown.run("document.querySelector('#search').value") == "word"
    shown.run("location.hash = '#prompt=999&a=nothing&b=&show=__proto__'")
    shown.until(f"{SHOWN} === 'Prompt 4 of 4'")
    assert titles(shown)[1].startswith("B: ckpt_005")


def test_more_columns(shown: Page) -> None:
    """Catches a third column that cannot be added, or taken away."""
    shown.run("document.querySelector('#add').click()")
    shown.until("document.querySelectorAll('.column').length === 3")
    shown.run("document.querySelectorAll('.strip button')[2].click()")
    shown.until("document.querySelectorAll('.column h3')[2].innerText.includes('ckpt_002')")
    shown.run("document.querySelector('#remove').click()")
    shown.until("document.querySelectorAll('.column').length === 2")


def test_spans_of_the_training_data(shown: Page) -> None:
    """Catches a mark on other words, and a text that was not searched shown as not in the data."""
    assert shown.text(".column .note + .note") == "Not in the training data: no 8 tokens in a row."
    assert shown.run("document.querySelectorAll('.column:last-child .note').length") == 1
    shown.press("j")
    shown.until("document.querySelector('details.verbatim')")
    assert shown.text(".column mark.verbatim") == "the same"[:8]
    shown.run("document.querySelector('details.verbatim').open = true")
    said = shown.text("details.verbatim")
    for part in ("9 tokens, 3 places", "chunk_007 row 41", "web: f:d", "one step 34: trained"):
        assert part in said, part


def test_hostile_text_is_text(shown: Page) -> None:
    """Catches a text that runs, hides its characters or turns the page around."""
    for _ in range(3):
        shown.press("j")
    shown.until(f"{SHOWN} === 'Prompt 4 of 4'")
    assert shown.run("document.querySelectorAll('img, main script').length") == 0
    visible = HOSTILE
    for hidden in "\x00\u202e\u2066\u2028":
        visible = visible.replace(hidden, f"\\u{ord(hidden):04x}")
    said = shown.run("document.querySelector('.column .said').textContent")
    assert said == f"{visible}0 \U0001f600"
    shown.press("/")
    shown.type("<img src=x onerror=boom()>")
    shown.until("document.querySelector('.column .hit')")
    assert shown.text(".column .hit") == "<img src=x onerror=boom()>"
    assert shown.run("document.querySelectorAll('img').length") == 0


def test_no_script_of_a_text_could_run(shown: Page) -> None:
    """Catches a policy that the browser does not keep: on a disk it is all that protects."""
    tried = shown.run(
        "new Promise(done => { addEventListener('securitypolicyviolation', e => "
        "done(e.effectiveDirective)); const s = document.createElement('script'); "
        "s.textContent = 'window.ran = 1'; document.body.append(s); })"
    )
    assert tried == "script-src-elem" and shown.run("window.ran === undefined")
    blocked = shown.run("fetch('https://127.0.0.1:9/').then(() => 'asked', () => 'refused')")
    assert blocked == "refused"
    assert all("Content Security Policy" in one for one in shown.problems)
    shown.problems.clear()
    shown.asked[:] = [one for one in shown.asked if not one.startswith("https://127.0.0.1:9")]


def test_a_reader_without_a_mouse(shown: Page) -> None:
    """Catches a control without a name, and a list that the keyboard cannot move."""
    nameless = shown.run(
        "[...document.querySelectorAll('input, select, button')].filter(e => !(e.labels && "
        "e.labels.length) && !e.innerText.trim() && !e.getAttribute('aria-label')).length"
    )
    assert nameless == 0
    shown.run("document.querySelector('#list').focus()")
    shown.press("ArrowDown")
    shown.until(f"{SHOWN} === 'Prompt 2 of 4'")
    assert shown.run("document.querySelector('[aria-selected=true] .text').innerText") == "a dog"
    active = shown.run("document.querySelector('#list').getAttribute('aria-activedescendant')")
    assert active == "row_1"


@pytest.mark.parametrize("width", (390, 1200))
def test_it_fits(shown: Page, width: int) -> None:
    """Catches a page that is wider than the window."""
    shown.look(width, 900, phone=width < 500)
    shown.until(f"innerWidth === {width}")
    assert shown.run("document.documentElement.scrollWidth") <= width
