"""Pages of a gallery: an address, a name that runs, a link to a page that is not there."""

import re

from k2train.gallery.page import POLICY, About, pages

EVIL = '<img src=x onerror=alert(1)>"\u202e{files}\ud800'
ADDRESS = re.compile(r"(?:https?:)?//[a-z]|url\(|@import", re.IGNORECASE)


def html(about: About) -> dict[str, str]:
    return dict(pages(about))


def test_nothing_is_loaded_from_elsewhere() -> None:
    """Catches a script inside a page, and a page without its policy."""
    found = html(About("demo", 3, 2, ["quiz"]))
    assert sorted(found) == ["evaluation.html", "index.html", "prompts.html"]
    for text in found.values():
        assert not ADDRESS.search(text) and text.encode()
        assert f'http-equiv="Content-Security-Policy" content="{POLICY}"' in text
        loaded = re.findall(r"<script([^>]*)>([^<]*)</script>", text)
        assert all(re.fullmatch(r' src="\{files\}/\w+\.js" defer', facts) for facts, _ in loaded)
        assert not any(content for _, content in loaded) and " style=" not in text


def test_names_are_text() -> None:
    """Catches a run, task or note whose name is markup, reorders the page or names the folder."""
    about = About(EVIL, 3, 2, [EVIL], [EVIL], EVIL)
    for text in html(about).values():
        assert "<img" not in text and "\u202e" not in text
        assert text.count("{files}") == len(re.findall(r'(?:src|href)="\{files\}/', text))
        assert text.replace("{files}", "f").encode()


def test_pages_that_are_there_are_linked() -> None:
    """Catches a link that leads nowhere."""
    for about in (About("d", 1, 1, []), About("d", 1, 0, ["quiz"]), About("d", 1, 1, ["quiz"])):
        found = html(about)
        for text in found.values():
            assert set(re.findall(r'href="(\w+\.html)"', text)) <= set(found)
        linked = re.findall(r'href="(\w+\.html)"', found["index.html"])
        assert {"index.html", *linked} == set(found)


def test_the_command_is_shown_where_there_is_no_index() -> None:
    """Catches a reader who does not learn how to get the spans."""
    command = "python tools/trace.py index runs/demo"
    assert f"<code>{command}</code>" in html(About("d", 1, 1, [], (), command))["prompts.html"]
    assert "tools/trace.py" not in html(About("d", 1, 1, []))["prompts.html"]
