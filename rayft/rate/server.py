"""The page's server: a few JSON calls over the ledger. What it sends of models' texts is text, or Markdown without HTML."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from markdown_it import MarkdownIt
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rayft.errors import StorageError
from rayft.rate.items import Item
from rayft.rate.ledger import Event, Ledger, standing
from rayft.rate.share import order_of_answers, share_out

COOKIE = "rater"
ELSEWHERE = "you have rated this one already, perhaps in another tab"
MAX_BODY, MAX_COMMENT, MAX_NAME = 64_000, 4_000, 40

#: Nothing but our own script and style runs, and nothing is loaded from elsewhere, whatever a model wrote.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
STATIC = {
    "": ("page.html", "text/html"),
    "page.js": ("page.js", "text/javascript"),
    "page.css": ("page.css", "text/css"),
}


@dataclass(frozen=True)
class Settings:
    """Who may rate and how items are dealt.

    raters: their names; empty lets everybody in under a name of their own choice. overlap: share of the items that all
    of them rate. token: with it a rater needs the personal key of a link (`link_key`). hosts: names the server answers to.
    """

    raters: Sequence[str] = ()
    overlap: float = 1.0
    seed: int = 0
    token: str | None = None
    hosts: Sequence[str] = ("127.0.0.1", "localhost", "[::1]")


def link_key(token: str, rater: str) -> str:
    """The key in a rater's personal link."""
    return hmac.new(token.encode(), f"link {rater}".encode(), hashlib.sha256).hexdigest()[:32]


@dataclass
class Desk:
    """The ratings while the page is open: who has what to rate next, and what they said."""

    items: Sequence[Item]
    ledger: Ledger
    settings: Settings
    _by_id: dict[str, Item] = field(init=False)
    _markdown: MarkdownIt = field(init=False)

    def __post_init__(self) -> None:
        self._by_id = {item.id: item for item in self.items}
        self._markdown = MarkdownIt("commonmark", {"html": False}).enable("table")

    def next(self, rater: str) -> dict[str, Any]:
        """What the page shows this rater: the next item of their share, or that there is none left."""
        own = share_out(self.items, self.settings.raters, rater, self.settings.overlap, self.settings.seed)
        stands = standing(self.ledger.events)
        left = [item for item in own if (rater, item.id) not in stands]
        shown: dict[str, Any] = {"rater": rater, "done": len(own) - len(left), "total": len(own)}
        shown["undo"] = self._last(rater) is not None
        if left:
            item = left[0]
            texts = [item.answers[n].text for n in order_of_answers(self.settings.seed, item, rater)]
            shown["item"] = {
                "id": item.id,
                "turns": item.turns,
                "answers": [{"raw": text, "html": self._markdown.render(text)} for text in texts],
            }
        return shown

    def rate(self, rater: str, said: dict[str, Any]) -> str | None:
        """Write down a rating or a skip; returns what is wrong with it, if anything is. Twice the same counts once."""
        item = self._by_id.get(str(said.get("item")))
        own = share_out(self.items, self.settings.raters, rater, self.settings.overlap, self.settings.seed)
        if item is None or item not in own:
            return "there is no such item for this rater"
        request, comment = said.get("request"), said.get("comment", "")
        if not isinstance(request, str) or not 8 <= len(request) <= 64:
            return "the request has no name"
        if not isinstance(comment, str) or len(comment) > MAX_COMMENT:
            return f"the comment is longer than {MAX_COMMENT} characters"
        seconds = said.get("seconds", 0)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < 1e7:
            return "the time is no number of seconds"
        shown = order_of_answers(self.settings.seed, item, rater)
        skip = said.get("skip") is True
        ranking = () if skip else _ranking(said.get("ranking"), shown)
        if ranking is None:
            return "the ranking does not name every answer once"
        stands = standing(self.ledger.events).get((rater, item.id))
        if stands is not None and stands.request != request:
            return ELSEWHERE
        if stands is None:
            kind = "skip" if skip else "rating"
            self.ledger.append(
                Event(kind, item.id, rater, request, shown, ranking, comment, round(float(seconds), 2))  # type: ignore[arg-type]
            )
        return None

    def undo(self, rater: str, request: Any) -> str | None:
        """Take back the rater's last rating or skip that stands; returns what is wrong, if anything is."""
        if not isinstance(request, str) or not 8 <= len(request) <= 64:
            return "the request has no name"
        last = self._last(rater)
        if last is not None:
            self.ledger.append(Event("undo", last.item, rater, request))
        return None

    def _last(self, rater: str) -> Event | None:
        stands = [event for (name, _), event in standing(self.ledger.events).items() if name == rater]
        return stands[-1] if stands else None  # in the order of the ledger


def application(desk: Desk, secret: str) -> Starlette:
    """The web application. Sessions are cookies signed with `secret`."""
    settings = desk.settings

    def sign(name: str) -> str:
        # With the token in it, sessions end when the token changes.
        said = f"session {settings.token or ''} {name}".encode()
        return f"{name}.{hmac.new(secret.encode(), said, hashlib.sha256).hexdigest()}"

    def rater_of(request: Request) -> str | None:
        cookie = request.cookies.get(COOKIE, "")
        name = _unquoted(cookie.rpartition(".")[0])
        known = hmac.compare_digest(cookie.encode(), _quoted(sign(name)).encode())
        return name if known and _may_rate(settings, name) else None

    async def static(request: Request) -> Response:
        name, kind = STATIC[request.url.path.lstrip("/")]
        text = resources.files("rayft.rate").joinpath(name).read_text(encoding="utf-8")
        return Response(text, media_type=kind)

    async def login(request: Request) -> Response:
        said = await _said(request)
        name = said.get("name") if said else None
        if not isinstance(name, str) or not _may_rate(settings, name):
            return _refused("this name is not among the raters", 403)
        key = said.get("key") if said else None
        if settings.token and not hmac.compare_digest(
            str(key).encode(), link_key(settings.token, name).encode()
        ):
            return _refused("open the personal link you were given: this one has no valid key", 403)
        response = JSONResponse({"rater": name})
        response.set_cookie(COOKIE, _quoted(sign(name)), httponly=True, samesite="strict", max_age=30 * 86400)
        return response

    async def show(request: Request) -> Response:
        rater = rater_of(request)
        return (
            JSONResponse(await run_in_threadpool(desk.next, rater))
            if rater
            else _refused("who are you?", 401)
        )

    def saying(act: Callable[[str, dict[str, Any]], str | None]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            rater, said = rater_of(request), await _said(request)
            if rater is None:
                return _refused("who are you?", 401)
            if said is None:
                return _refused("this is no JSON object", 400)
            try:
                wrong = await run_in_threadpool(act, rater, said)
            except StorageError as error:
                return _refused(str(error), 507)
            if wrong:
                return _refused(wrong, 409 if wrong == ELSEWHERE else 400)
            return JSONResponse(await run_in_threadpool(desk.next, rater))

        return endpoint

    return Starlette(
        routes=[
            *[Route(f"/{name}", static) for name in STATIC],
            Route("/api/login", login, methods=["POST"]),
            Route("/api/next", show),
            Route("/api/rate", saying(desk.rate), methods=["POST"]),
            Route(
                "/api/undo",
                saying(lambda rater, said: desk.undo(rater, said.get("request"))),
                methods=["POST"],
            ),
        ],
        middleware=[Middleware(_Guard, hosts=frozenset(settings.hosts))],
    )


class _Guard:
    """Adds HEADERS to every answer. Refuses calls that another site's page makes, and those under a name that is not the
    server's, by which another site could pretend to be it (DNS rebinding)."""

    def __init__(self, app: Any, hosts: frozenset[str]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = {name.lower(): value for name, value in scope["headers"]}
        if _host(given.get(b"host", b"").decode("latin-1")) not in self.hosts:
            await _refused("this page is not served under that name (see --allow-host)", 400)(
                scope, receive, send
            )
            return
        elsewhere = given.get(b"sec-fetch-site", b"none") not in (b"none", b"same-origin")
        if scope["method"] == "POST" and (
            elsewhere or not given.get(b"content-type", b"").startswith(b"application/json")
        ):
            await _refused("only this page may send ratings", 403)(scope, receive, send)
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
            await send(message)

        await self.app(scope, receive, with_headers)


def _host(header: str) -> str:
    """The name in a Host header, without the port."""
    return header[: header.find("]") + 1] if header.startswith("[") else header.partition(":")[0]


def _may_rate(settings: Settings, name: str) -> bool:
    if settings.raters:
        return name in settings.raters
    return name == name.strip() and 1 <= len(name) <= MAX_NAME and name.isprintable()


def _ranking(said: Any, shown: Sequence[int]) -> tuple[tuple[int, ...], ...] | None:
    """Groups of positions, best first, as groups of answers' numbers; None unless each is named once."""
    if not isinstance(said, list) or not all(isinstance(group, list) and group for group in said):
        return None
    positions = [position for group in said for position in group]
    if not all(type(p) is int for p in positions) or sorted(positions) != list(range(len(shown))):
        return None
    return tuple(tuple(shown[position] for position in group) for group in said)


async def _said(request: Request) -> dict[str, Any] | None:
    """The JSON object that was sent; None if it is none, or too long."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            return None
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


def _refused(why: str, status: int) -> JSONResponse:
    return JSONResponse({"error": why}, status_code=status)


def _quoted(text: str) -> str:
    """For a cookie: names may hold any letters."""
    name, dot, rest = text.rpartition(".")
    return name.encode().hex() + dot + rest


def _unquoted(name: str) -> str:
    try:
        return bytes.fromhex(name).decode()
    except ValueError:
        return ""
