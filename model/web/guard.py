"""The door: lets in what the page itself asks for, within limits, and notices who leaves.

Gradio serves more than this page needs: an API, a proxy, tools of its developers. All that is closed here.
"""

from __future__ import annotations

import json
import re
import secrets
from collections import Counter
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from typing import Any

from .limits import Limits, RateLimiter
from .uploads import UploadFolder, megabytes
from .visitors import Visitors
from .words import language_of, say

API = "/gradio_api"
FILE = f"{API}/file="
_GET = re.compile(
    rf"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt|logout)/?|/(assets|static)/.*"
    rf"|{API}/(app_id|startup-events|theme\.css|user|login_check|queue/data|upload_progress|heartbeat/[^/]+|file=.+)/?"
)
_POST = re.compile(rf"/login/?|{API}/(queue/join|upload)/?")
_MOST_JSON = 1_000_000
LOGINS_PER_MINUTE = 30
"""Wrong passwords from one address; right ones are not counted."""
_COOKIE = "web_demo_page"
_SELF = "'self' blob: data:"
# Gradio's page knows "zh-CN" and "zh-TW" alone, and would be English in Singapore.
_HEAD = b"""<head><script>if (/^zh/i.test(navigator.language)) {
    Object.defineProperty(navigator, "language", {value: "zh-CN"});
}</script>"""
_HEADERS = {
    # Whatever an answer holds, the browser asks no other host for anything. Gradio's page needs inline code.
    "content-security-policy": f"default-src {_SELF}; script-src {_SELF} 'unsafe-inline' 'unsafe-eval'; style-src "
    f"{_SELF} 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Guard:
    """ASGI middleware in front of Gradio."""

    def __init__(self, app: Any, limits: Limits, visitors: Visitors, uploads: UploadFolder) -> None:
        self._app, self._limits, self._visitors, self._uploads = app, limits, visitors, uploads
        self._open_pages: Counter[str] = Counter()  # by browser
        self._logins = RateLimiter()
        self._uploading: list[int] = []  # bytes of the uploads under way

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # a web socket, which the page has none of
        refused = self._refuse(scope)
        if refused is not None:
            await _reply(send, *refused)
            return
        path, browser = scope["path"], self._browser(scope)
        new = browser is None
        browser = browser or secrets.token_urlsafe(16)

        async def send_on(message: Any) -> None:
            if message["type"] == "http.response.start":
                if path.startswith("/login") and message["status"] != 400:
                    self._logins.give_back(_address(scope))
                headers = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                if new and path == "/":
                    cookie = f"{_COOKIE}={browser}; HttpOnly; SameSite=Lax; Path=/"
                    headers.append((b"set-cookie", cookie.encode()))
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        if path.startswith(f"{API}/heartbeat/"):
            await self._watch(path.split("/")[3], browser, self._app(scope, receive, send_on))
        elif path.rstrip("/") == f"{API}/upload":
            await self._upload(scope, receive, send_on, browser)
        elif path.startswith(FILE) and scope["method"] == "GET":
            await self._show(scope, receive, send_on)
        elif path == "/" and scope["method"] == "GET":
            await self._change(scope, receive, send_on, lambda body: body.replace(b"<head>", _HEAD, 1))
        else:
            await self._app(scope, receive, send_on)

    def _refuse(self, scope: Any) -> tuple[int, str] | None:
        """Return status and reason for a request that is not answered."""
        path, method, headers = scope["path"], scope["method"], dict(scope["headers"])
        language = language_of(headers.get(b"accept-language", b"").decode("latin-1"))
        routes = {"GET": _GET, "HEAD": _GET, "POST": _POST}.get(method)
        if routes is None or not routes.fullmatch(path):
            return 404, "not found"
        if path.startswith(FILE) and self._uploads.find(path.removeprefix(FILE)) is None:
            return 404, "not found"
        if method != "POST":
            return None
        try:  # a chunked request is read to its end, whatever length it names
            length = int(b"" if b"transfer-encoding" in headers else headers.get(b"content-length", b""))
        except ValueError:
            return 411, "a request needs its length"
        if path.rstrip("/") == f"{API}/upload":
            most = self._limits.max_pictures * (self._limits.max_picture_bytes + 10_000)
            if length > most:
                return 413, say(language, "large_upload", megabytes=megabytes(most))
            has_room = self._uploads.has_room(length + sum(self._uploading))
            return None if has_room else (507, say(language, "no_room_for_uploads"))
        if length > _MOST_JSON:
            return 413, "too large"
        # Counted before the answer is known, or many could be tried at once; `send_on` takes a right one back.
        if path.startswith("/login") and self._logins.take(_address(scope), LOGINS_PER_MINUTE) > 0:
            return 429, say(language, "many_logins")
        return None

    def _browser(self, scope: Any) -> str | None:
        """Return what this browser is called, by its cookie; a name for its uploads, no proof of anything."""
        cookie = SimpleCookie()
        try:
            cookie.load(dict(scope["headers"]).get(b"cookie", b"").decode("latin-1"))
        except CookieError:
            return None
        return cookie[_COOKIE].value[:64] if _COOKIE in cookie else None

    async def _watch(self, key: str, browser: str, serving: Any) -> None:
        """Serve the connection that a page keeps open; when it ends, the visitor has left."""
        self._visitors.connect(key)
        self._open_pages[browser] += 1
        try:
            await serving
        finally:
            self._visitors.leave(key)
            self._open_pages[browser] -= 1
            if self._open_pages[browser] <= 0:
                del self._open_pages[browser]
                self._uploads.delete_of(browser)

    async def _show(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve an upload, whole, because it may be deleted at any moment: as soon as its question is asked."""
        try:
            await self._change(scope, receive, send, bytes)
        except Exception:
            if self._uploads.find(scope["path"].removeprefix(FILE)) is not None:
                raise
            await _reply(send, 404, "not found")

    async def _upload(self, scope: Any, receive: Any, send: Any, browser: str) -> None:
        """Take uploads in; the answer names them by paths of ours."""

        def adopt(body: bytes) -> bytes:
            return json.dumps([self._uploads.adopt(path, browser) for path in json.loads(body)]).encode()

        has_left = False

        async def listen() -> Any:
            nonlocal has_left
            message = await receive()
            has_left |= message["type"] == "http.disconnect"
            return message

        length = int(dict(scope["headers"])[b"content-length"])
        self._uploading.append(length)
        try:
            await self._change(scope, listen, send, adopt)
        except Exception:
            if not has_left:  # otherwise there is nobody to tell, and nothing to look into
                raise
        finally:
            self._uploading.remove(length)
            if not self._uploading:
                self._uploads.clear_shared()

    async def _change(self, scope: Any, receive: Any, send: Any, change: Callable[[bytes], bytes]) -> None:
        """Answer with a changed body, unless Gradio refuses the request."""
        started: dict[str, Any] = {}
        body = bytearray()

        async def collect(message: Any) -> None:
            if message["type"] == "http.response.start":
                started.update(message)
            else:
                body.extend(message.get("body", b""))

        await self._app(scope, receive, collect)
        if started["status"] == 200:
            body = bytearray(change(bytes(body)))
        headers = [pair for pair in started["headers"] if pair[0] != b"content-length"]
        await send({**started, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
        await send({"type": "http.response.body", "body": bytes(body)})


def _address(scope: Any) -> str:
    return str((scope.get("client") or ("?",))[0])


async def _reply(send: Any, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
