"""The page in a real browser over the real server: keys, blindness, personal links, hostile texts, a killed server."""

from __future__ import annotations

import json
import os
import re
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayft.rate.ledger import RATINGS, read_events, standing
from tests.rating import Page, enter
from tests.tiny_data import write_jsonl

pytest_plugins = ["tests.browser"]

HOSTILE = (
    "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\n\n"
    "[click](javascript:window.hacked=3) ![x](http://127.0.0.1:9/x.png) **bold** <b>tag</b>"
)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    pages: list[Page] = []

    def start(rows: list[dict[str, Any]] | None, *arguments: str, **options: Any) -> Page:
        given = ("--answers", str(write_jsonl(tmp_path / "answers.jsonl", rows))) if rows else ()
        pages.append(Page(tmp_path / "ratings", *given, *arguments, **options))
        return pages[-1]

    yield start
    for page in pages:
        page.stop(signal.SIGKILL)


def rows(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"question {i}", "completions": [f"good {i}", f"bad {i}"]} for i in range(count)]


def events_of(page: Page) -> list[Any]:
    return list(read_events(page.folder / RATINGS))


def test_rating_by_keys(browser: Any, started: Any, tmp_path: Path) -> None:
    """Better, tie, skip, undo, a comment, views; everything is on disk when the page moves on."""
    page = started(rows(4))
    tab = enter(browser, page)
    assert tab.text_content("#count") == "0 of 4"
    assert tab.locator(".panes.both .markdown").count() == 2
    tab.keyboard.press("m")
    assert tab.locator(".panes.rendered").count() == 2
    tab.keyboard.press("c")
    tab.keyboard.type("uses 1 and 2 well")  # digits in a comment rate nothing
    tab.keyboard.press("Escape")
    left = tab.text_content(".answer[data-at='0'] .text")
    tab.keyboard.press("1")
    tab.wait_for_selector("#count:text-is('1 of 4')")
    (rated,) = events_of(page)
    assert (rated.rater, rated.comment, rated.kind) == ("ann", "uses 1 and 2 well", "rating")
    items = {i["id"]: i for i in map(json.loads, (page.folder / "items.jsonl").read_text().splitlines())}
    assert items[rated.item]["answers"][rated.ranking[0][0]]["text"] == left
    tab.keyboard.press("0")
    tab.wait_for_selector("#count:text-is('2 of 4')")
    tab.keyboard.press("s")
    tab.wait_for_selector("#count:text-is('3 of 4')")
    tab.keyboard.press("u")
    tab.wait_for_selector("#count:text-is('2 of 4')")
    assert [e.kind for e in events_of(page)] == ["rating", "rating", "skip", "undo"]
    tab.keyboard.press("ArrowRight")
    tab.wait_for_selector("#count:text-is('3 of 4')")
    tab.keyboard.press("2")
    tab.wait_for_selector("#finished")
    assert len(standing(events_of(page))) == 4
    said = page.stop()
    assert "Raters" in said
    assert re.search(r"3 rows are in\s.*preferences\.jsonl", said)


def test_raters_cannot_tell_where_an_answer_comes_from(browser: Any, started: Any) -> None:
    page = started([{"prompt": "q", "completion_secretmodel": "a", "completion_othermodel": "b"}])
    tab = enter(browser, page)
    assert "model" not in tab.content().replace("models", "")


def test_lists_are_ranked(browser: Any, started: Any) -> None:
    page = started([{"prompt": "q", "completions": ["a", "b", "c"]}])
    tab = enter(browser, page)
    shown = [tab.text_content(f".answer[data-at='{n}'] .text") for n in range(3)]
    tab.keyboard.press("3")
    tab.keyboard.press("Backspace")
    tab.keyboard.press("2")
    tab.keyboard.press("1")
    tab.wait_for_selector("#finished")
    (event,) = events_of(page)
    assert [["a", "b", "c"][group[0]] for group in event.ranking] == [shown[1], shown[0], shown[2]]


def test_texts_of_models_are_never_html(browser: Any, started: Any) -> None:
    page = started([{"prompt": HOSTILE, "completions": [HOSTILE, "plain"]}])
    tab = enter(browser, page)
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.wait_for_timeout(300)
    assert tab.evaluate("window.hacked") is None
    assert tab.locator("main img, main script").count() <= 1  # the image of the Markdown, which is not loaded
    assert not [url for url in asked if ":9/" in url]
    assert tab.locator("main a[href^='javascript']").count() == 0
    assert tab.locator(".markdown strong").text_content() == "bold"
    assert HOSTILE in tab.locator(".text").all_text_contents()
    headers = urllib.request.urlopen(page.url, timeout=5).headers
    assert "default-src 'none'" in headers["Content-Security-Policy"]


def test_a_killed_server_loses_and_doubles_nothing(browser: Any, started: Any) -> None:
    """Clicks while it is down are sent again to the one that follows, under the same name, and count once."""
    page = started(rows(3))
    tab = enter(browser, page)
    tab.keyboard.press("1")
    tab.wait_for_selector("#count:text-is('1 of 3')")
    page.stop(signal.SIGKILL)
    tab.keyboard.press("2")
    tab.wait_for_selector("#problem:not([hidden])")
    started(None, port=page.port)
    tab.wait_for_selector("#count:text-is('2 of 3')")
    found = events_of(page)
    assert len(found) == len({event.item for event in found}) == 2


def test_personal_links(browser: Any, started: Any) -> None:
    """With a token a rater needs the key of their link, and sees nobody else's ratings."""
    page = started(rows(4), "--token", "s3cret", "--raters", "ann,bob", "--overlap", "1")
    assert page.post("api/login", {"name": "ann"})[0] == 403
    assert page.post("api/login", {"name": "eve", "key": "x"})[0] == 403
    from rayft.rate.server import link_key

    tab = browser.new_context().new_page()
    tab.goto(f"{page.url}#rater=ann&key={link_key('s3cret', 'ann')}")
    tab.wait_for_selector("#rating")
    assert "key" not in tab.url
    tab.keyboard.press("1")
    tab.wait_for_selector("#count:text-is('1 of 4')")
    other = browser.new_context().new_page()
    other.goto(f"{page.url}#rater=bob&key={link_key('s3cret', 'bob')}")
    other.wait_for_selector("#rating")
    assert other.text_content("#count") == "0 of 4"
    assert other.locator(".undo:visible").count() == 0
    stranger = browser.new_context().new_page()
    stranger.goto(page.url)
    stranger.wait_for_selector("#login:not([hidden])")


def test_what_the_server_refuses(started: Any) -> None:
    page = started(rows(2))
    status, _ = page.post("api/rate", {})
    assert status == 401
    assert page.post("api/login", {"name": "ann"}, **{"Sec-Fetch-Site": "cross-site"})[0] == 403
    assert page.post("api/login", {"name": "ann"}, **{"Content-Type": "text/plain"})[0] == 403
    assert page.post("api/login", {"name": "ann"}, Host="evil.example")[0] == 400
    assert page.post("api/login", {"name": " ann"})[0] == 403
    request = urllib.request.Request(
        page.url + "api/login", b'{"name": "ann"}', {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=5) as response:
        cookie = response.headers["Set-Cookie"].split(";")[0]
        assert "httponly" in response.headers["Set-Cookie"].lower()
    forged = cookie[:-4] + ("0000" if not cookie.endswith("0000") else "1111")
    assert page.post("api/rate", {}, Cookie=forged)[0] == 401
    (first, *_) = map(json.loads, (page.folder / "items.jsonl").read_text().splitlines())
    fine = {"item": first["id"], "request": "request-1", "ranking": [[0], [1]]}
    for wrong in (
        {"item": "nothing"},
        {"request": "x"},
        {"ranking": [[0]]},
        {"ranking": [[0], [0]]},
        {"ranking": [[0], [2]]},
        {"ranking": [[0], [True]]},
        {"ranking": "ab"},
        {"comment": "x" * 5000},
        {"seconds": -1},
    ):
        assert page.post("api/rate", {**fine, **wrong}, Cookie=cookie)[0] == 400, wrong
    assert page.post("api/rate", {"x": "y" * 70_000}, Cookie=cookie)[0] == 400
    assert page.post("api/rate", fine, Cookie=cookie)[0] == 200
    assert page.post("api/rate", fine, Cookie=cookie)[0] == 200
    assert page.post("api/rate", {**fine, "request": "request-2"}, Cookie=cookie)[0] == 409
    assert len(events_of(page)) == 1


def test_only_loopback_goes_without_a_token(tmp_path: Path) -> None:
    from rayft.cli import main

    path = write_jsonl(tmp_path / "a.jsonl", rows(1))
    assert main(["rate", str(tmp_path / "r"), "--answers", str(path), "--host", "0.0.0.0"]) == 2
    assert main(["rate", str(tmp_path / "r"), "--answers", str(path), "--token", "x"]) == 2
    everywhere = ["--host", "0.0.0.0", "--token", "x", "--raters", "ann"]
    assert main(["rate", str(tmp_path / "r"), "--answers", str(path), *everywhere]) == 2
    assert main(["rate", str(tmp_path / "r"), "--answers", str(path), "--port", "70000"]) == 2
    assert main(["rate", str(tmp_path / "s")]) == 2
    assert main(["ratings", str(tmp_path / "s")]) == 2


def test_a_screenshot_for_people_to_look_at(browser: Any, started: Any) -> None:
    """Written where RAYFT_SCREENSHOTS says; without it only that it can be taken."""
    answer = "## Steps\n\n1. **Open** the lid\n2. Add `water`\n\n| a | b |\n|---|---|\n| 1 | 2 |"
    page = started([{"prompt": "How do I make tea?", "completions": [answer, "Just *boil* it."]}])
    tab = enter(browser, page)
    picture = tab.screenshot(full_page=True)
    assert len(picture) > 10_000
    if folder := os.environ.get("RAYFT_SCREENSHOTS"):
        Path(folder, "rate.png").write_bytes(picture)
