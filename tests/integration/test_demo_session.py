"""`cloud-learner demo-session`: the real page, in a real Chromium, of a real device that learns.

The browser is spoken to over a pipe (the DevTools protocol), so that it needs no driver and no
port. Without a Chromium its tests are skipped.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE_S, VISITORS = 120, 60
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-extensions"),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--remote-debugging-pipe",
)
TROUBLE = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")


class Browser:
    """One page in a Chromium of its own; what it says unasked is kept in `events`."""

    def __init__(self, program: str, folder: Path) -> None:
        self._pipe, theirs = socket.socketpair()
        self._pipe.settimeout(PATIENCE_S)
        with theirs:
            end = theirs.fileno()  # Chromium reads what it is asked from 3, and answers to 4
            self._process = subprocess.Popen(
                [
                    *("bash", "-c", f'exec "$@" 3<&{end} 4>&{end}', "-"),
                    *(program, *FLAGS, f"--user-data-dir={folder}", "about:blank"),
                ],
                pass_fds=[end],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self._rest, self._numbers = b"", itertools.count(1)
        self._page: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        pages = self.call("Target.getTargets")["targetInfos"]
        target = next(each["targetId"] for each in pages if each["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._page = {"sessionId": attached["sessionId"]}
        for domain in ("Runtime", "Log", "Network", "Page"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        asked = {"id": number, "method": method, "params": parameters, **self._page}
        self._pipe.sendall(json.dumps(asked).encode() + b"\0")
        while (said := self._read()).get("id") != number:
            self.events.append(said)
        assert "error" not in said, said["error"]
        return said["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = self._pipe.recv(1 << 16)
            assert data, "Chromium has gone"
            self._rest += data
        said, _, self._rest = self._rest.partition(b"\0")
        return json.loads(said)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives; a promise is awaited."""
        asked = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        found = self.call("Runtime.evaluate", **asked)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait for a condition in JavaScript, looked at in each frame."""
        look = f"const look = () => ({condition}) ? done() : requestAnimationFrame(look)"
        self.value(f"new Promise(done => {{ {look}; look(); }})")

    def close(self) -> None:
        self._page = {}
        self.call("Browser.close")
        self._pipe.close()
        self._process.wait(30)


class Page:
    """The demo's page as a person sees it; a list is told as (title, genres, what is beside it)."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.browser, self.url = browser, url

    def open(self, width: int = 1280) -> None:
        """The page anew, of somebody who was never here."""
        shape = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 640}
        self.browser.call("Emulation.setDeviceMetricsOverride", **shape)
        still = {"name": "prefers-reduced-motion", "value": "reduce"}  # a row moves under no click
        self.browser.call("Emulation.setEmulatedMedia", features=[still])
        self.browser.call("Page.navigate", url=self.url)
        self.browser.until("document.querySelectorAll('#with li').length === 10")
        self.press("#close")

    def press(self, selector: str) -> None:
        """A click of the mouse in the middle of what is there, and its answer."""
        x, y = self.browser.value(
            f"""(() => {{
                const found = document.querySelector({json.dumps(selector)});
                found.scrollIntoView({{ block: "center" }});
                const box = found.getBoundingClientRect();
                return [box.x + box.width / 2, box.y + box.height / 2];
            }})()"""
        )
        for kind in ("mousePressed", "mouseReleased"):
            parameters = {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1}
            self.browser.call("Input.dispatchMouseEvent", **parameters)
        self.browser.until("!busy")

    def key(self, name: str, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            said = {"key": name, "code": name, "text": text if kind == "keyDown" else ""}
            code = {"Tab": 9, "Enter": 13}[name]
            self.browser.call(
                "Input.dispatchKeyEvent", type=kind, windowsVirtualKeyCode=code, **said
            )

    def list(self, name: str) -> list[tuple[str, list[str], str]]:
        rows = self.browser.value(
            f"""[...document.querySelectorAll("#{name} li")].map(row =>
                [".title", ".genres", ".was"].map(part => row.querySelector(part)?.textContent))"""
        )
        return [(title, genres.split(", "), beside) for title, genres, beside in rows]

    def text(self, selector: str) -> str:
        return self.browser.value(f"document.querySelector({json.dumps(selector)}).textContent")

    def choose(self, genre: str) -> None:
        """Click the lowest story of that genre that is shown."""
        at = max(n for n, (_, genres, _) in enumerate(self.list("with"), 1) if genre in genres)
        self.press(f"#with li:nth-child({at}) button")


class Demo:
    """The command as a child process; `url` once it serves."""

    def __init__(self, var: Path) -> None:
        self.var = var
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "cloud_learner.cli", "demo-session"),
                *("--var", str(var), "--port", "0"),
            ],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self.first_said = self._process.stderr.readline()
        self.url = self._process.stdout.readline().strip()
        assert self.url, self.first_said + self._process.communicate()[1]

    def ask(self, what: str, **asked: Any) -> dict[str, Any]:
        """What the page is told, errors too."""
        host = self.url.removeprefix("http://").removesuffix("/")
        connection = http.client.HTTPConnection(host, timeout=PATIENCE_S)
        headers = {"Content-Type": "application/json"}
        with contextlib.closing(connection):
            connection.request("POST", f"/{what}", json.dumps(asked), headers)
            return json.loads(connection.getresponse().read())

    def end(self) -> int:
        """As Ctrl-C does."""
        self._process.send_signal(signal.SIGINT)
        self._process.communicate(timeout=30)
        return self._process.returncode


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    demo = Demo(tmp_path_factory.mktemp("demo"))
    yield demo
    demo.end()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = next((found for name in PROGRAMS if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    browser = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser: Browser, demo: Demo) -> Page:
    page = Page(browser, demo.url)
    page.open()
    return page


def titles(rows: list[tuple[str, list[str], str]]) -> list[str]:
    return [title for title, _, _ in rows]


def known(rows: list[tuple[str, list[str], str]]) -> list[str]:
    """The titles that do not stand there by chance."""
    return [title for title, _, beside in rows if beside != "tried out"]


def places_of(rows: list[tuple[str, list[str], str]], genre: str) -> int:
    return sum(genre in genres for _, genres, _ in rows)


def in_one_order(one: list[str], other: list[str]) -> bool:
    return [each for each in one if each in other] == [each for each in other if each in one]


def test_visitors_click_more_where_sessions_order_what_they_see(demo):
    clicks = dict.fromkeys(["shown", "model"], 0)
    for visitor, page in itertools.product(range(VISITORS), range(10)):
        view = demo.ask("visit", visitor=visitor, page=page)
        for order in clicks:
            clicks[order] += sum(story["clicked"] for story in view[order])

    assert clicks["shown"] > clicks["model"] > VISITORS


def test_a_label_of_another_session_is_refused_and_changes_nothing(demo):
    theirs = demo.ask("rank", key="theirs")["shown"][0]

    told = demo.ask("click", key="mine", id=theirs["id"], passed=[])

    assert told["code"] == "other_session"
    assert demo.ask("rank", key="mine")["labels"] == 0
    assert demo.ask("click", key="theirs", id=theirs["id"], passed=[])["labels"] == 1


@pytest.mark.parametrize(
    ("what", "asked"),
    [
        ("rank", {}),
        ("rank", {"key": ""}),
        ("rank", {"key": "k" * 65}),
        ("rank", {"key": "k", "more": 1}),
        ("click", {"key": "k", "id": "x", "passed": ["x"] * 11}),
        ("visit", {"visitor": -1, "page": 0}),
        ("visit", {"visitor": 1, "page": 10}),
    ],
)
def test_what_is_no_question_is_refused(demo, what, asked):
    assert demo.ask(what, **asked)["code"] == "bad_request"


def test_clicks_lift_their_genre_and_leave_the_model_alone(page):
    before, model = page.list("with"), page.list("without")
    genre = next(g for _, gs, _ in reversed(before) for g in gs if places_of(before, g) <= 3)

    for _ in range(6):
        page.choose(genre)

    after = page.list("with")
    assert places_of(after, genre) > places_of(before, genre)
    assert page.list("without") == model
    assert page.text("#said").startswith("It has learned from ")
    names = "[...document.querySelectorAll('#genres > :nth-child(3n + 1)')]"
    shift = f"{names}.find(each => each.textContent === '{genre}').nextSibling.nextSibling"
    assert page.browser.value(f"{shift}.textContent").startswith("+")


def test_what_a_ranking_and_a_label_cost_is_shown(page):
    page.press("#with li:nth-child(4) button")

    for shown in ("#rank-us", "#label-us"):
        assert re.fullmatch(r"[\d,.]+ µs", page.text(shown))
    assert page.text("#stories") == "200"


def test_what_moved_is_marked(page):
    before = titles(page.list("with"))

    page.press("#with li:nth-child(6) button")

    after = titles(page.list("with"))
    marks = "[...document.querySelectorAll('#with .move')].map(each => each.textContent)"
    expected = [
        "new" if title not in before else f"{'▲' if by > 0 else '▼'} {abs(by)}" if by else ""
        for at, title in enumerate(after)
        for by in [before.index(title) - at if title in before else 0]
    ]
    assert page.browser.value(marks) == expected


def test_a_reset_brings_the_first_order_back(page):
    first = known(page.list("with"))
    for _ in range(3):
        page.press("#with li:nth-child(10) button")
    adapted = known(page.list("with"))

    page.press("#reset")

    again = known(page.list("with"))
    assert not in_one_order(first, adapted) or set(first) != set(adapted)
    assert in_one_order(first, again)
    assert len(set(first) & set(again)) > 5
    assert page.text("#said") == "Nothing is known yet."


def test_a_session_outlives_the_page_and_ends_when_it_is_closed(page):
    page.press("#with li:nth-child(3) button")
    assert page.text("#said") == "It has learned from 3 labels so far."
    page.browser.call("Page.reload")
    page.browser.until("document.querySelectorAll('#with li').length === 10")
    assert page.text("#said") == "It has learned from 3 labels so far."

    page.press("#close")

    assert page.text("#said") == "Nothing is known yet."


def test_it_can_be_used_from_the_keyboard(page):
    page.browser.value("document.querySelector('#with button').focus()")
    page.key("Tab")
    second = titles(page.list("with"))[1]
    focused = "document.activeElement.querySelector('.title').textContent"
    assert page.browser.value(focused) == second

    page.key("Enter", "\r")
    page.browser.until("!busy && document.getElementById('said').textContent.includes('2 labels')")

    rows = titles(page.list("with"))
    assert page.browser.value(focused) == (second if second in rows else rows[0])


def test_visitors_come_click_and_leave_the_own_session_as_it_was(page):
    page.press("#with li:nth-child(2) button")
    page.browser.value("document.getElementById('visit').click()")
    page.browser.until("document.getElementById('visited').textContent.startsWith('Clicks of 2')")
    assert page.text("#with-title") == "With the visitor's session"
    page.press("#visit")

    assert page.text("#with-title") == "With your session"
    assert page.text("#said") == "It has learned from 2 labels so far."
    assert len(page.list("with")) == 10
    assert int(page.text("#clicks-with")) + int(page.text("#clicks-without")) > 0


@pytest.mark.parametrize("width", [1280, 900, 390])
def test_it_fits_its_window(browser, demo, width):
    page = Page(browser, demo.url)
    page.open(width)
    page.press("#with li:nth-child(5) button")

    assert browser.value("document.documentElement.scrollWidth") <= width


def test_the_page_has_nothing_to_complain_of_and_asks_nobody_else(page):
    """Nor in all that was done to it above."""
    asked = [
        each["params"]["request"]["url"]
        for each in page.browser.events
        if each["method"] == "Network.requestWillBeSent"
    ]
    trouble = [each for each in page.browser.events if each["method"] in TROUBLE]

    assert asked
    assert [url for url in asked if not url.startswith((page.url, "data:"))] == []
    assert trouble == []


def test_it_ends_by_a_signal_and_what_it_learned_serves_the_next_start(page, demo):
    assert demo.end() == 0
    page.press("#with li:nth-child(1) button")
    assert "Start it again: make demo-session" in page.text("#trouble")

    again = Demo(demo.var)
    assert "an earlier start has learned" in again.first_said
    Page(page.browser, again.url).open()
    assert again.end() == 0
