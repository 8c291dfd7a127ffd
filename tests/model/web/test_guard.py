"""The door in front of Gradio: what it lets in, and whom it sees leaving."""

from __future__ import annotations

import asyncio
import json

import pytest
from PIL import Image

from model.web.engine import Engine
from model.web.guard import LOGINS_PER_MINUTE, Guard
from model.web.limits import Limits
from model.web.uploads import UploadFolder
from model.web.visitors import Visitors
from model.web.words import say


class Door:
    """A guard before an application that says yes to everything, or stores an upload."""

    def __init__(self) -> None:
        self.limits = Limits(max_pictures=2, max_picture_bytes=1000)
        self.engine, self.uploads = Engine(), UploadFolder()
        self.visitors = Visitors(self.limits, self.engine)
        self.guard = Guard(self.app, self.limits, self.visitors, self.uploads)
        self.hang_up = asyncio.Event()
        self.stored, self.page = b"[]", b"yes"
        self.status = 200
        self.receive = None

    async def app(self, scope, receive, send):
        if "/heartbeat/" in scope["path"]:
            await self.hang_up.wait()
        body = self.stored if scope["path"].endswith("/upload") else self.page
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def open(self, path, method="GET", cookie="", **headers):
        scope = {"type": "http", "path": path, "method": method, "client": ("10.0.0.1", 5)}
        headers = {"content_length": "10", "cookie": cookie, **headers}
        scope["headers"] = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items() if v]
        sent = []

        async def send(message):
            sent.append(message)

        await self.guard(scope, self.receive, send)
        return sent

    def ask(self, *args, **kwargs):
        """Return status, headers and body."""
        start, body = asyncio.run(self.open(*args, **kwargs))
        return start["status"], dict(start["headers"]), body["body"]


@pytest.fixture
def door():
    door = Door()
    yield door
    door.engine.close()
    door.uploads.close()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *[("GET", path) for path in ("/", "/config", "/theme.css", "/assets/a.js", "/gradio_api/queue/data")],
        ("HEAD", "/"),
        ("POST", "/gradio_api/queue/join"),
        ("POST", "/login"),
    ],
)
def test_what_the_page_asks_for_is_let_in(door, method, path):
    assert door.ask(path, method)[0] == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *[("POST", f"/gradio_api/{name}") for name in ("call/ask", "run/predict", "api/predict", "component_server")],
        *[("POST", f"/gradio_api/{name}") for name in ("process_recording", "vibe-edit", "stream/x", "queue/join/x")],
        *[("POST", f"/gradio_api/{name}") for name in ("cancel", "reset")],
        *[
            ("GET", f"/gradio_api/{name}")
            for name in ("info", "openapi.json", "runs", "proxy=http://localhost/", "token")
        ],
        *[("GET", f"/gradio_api/file={name}") for name in ("/etc/passwd", "http://localhost/", "x", "//etc/passwd")],
        *[("GET", path) for path in ("/monitoring", "/gradio_api/deep_link", "/gradio_api/file/etc/passwd", "//")],
        *[(method, "/") for method in ("PUT", "DELETE", "OPTIONS", "TRACE")],
        ("POST", "/"),
    ],
)
def test_everything_else_is_closed(door, method, path):
    assert door.ask(path, method)[0] == 404


def test_every_chinese_is_the_one_that_gradio_knows(door):
    door.page = b"<html><head><title>"
    _, headers, body = door.ask("/")
    assert body.startswith(b"<html><head><script>")
    assert b"zh-CN" in body
    assert int(headers[b"content-length"]) == len(body)
    assert door.ask("/assets/a.js")[2] == door.page
    assert door.ask("/", "HEAD")[2] == door.page


def test_only_uploads_are_served(door):
    folder = door.uploads.path / "hash"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    path = door.uploads.adopt(str(folder / "a.png"), "me")
    assert door.ask(f"/gradio_api/file={path}")[0] == 200
    assert door.ask(f"/gradio_api/file={folder / 'a.png'}")[0] == 404
    assert door.ask(f"/gradio_api/file={path}/../../../x")[0] == 404


@pytest.mark.parametrize("is_asked", [True, False])
def test_an_upload_may_be_deleted_while_it_is_fetched(door, is_asked):
    """A quick visitor asks before the picture that was added is shown, and the file goes; that is no error of ours."""
    folder = door.uploads.path / "hash"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    path = door.uploads.adopt(str(folder / "a.png"), "me")

    async def fail(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if is_asked:
            door.uploads.delete(path)
        raise RuntimeError("no such file")

    door.guard._app = fail
    if is_asked:
        assert door.ask(f"/gradio_api/file={path}")[0] == 404
    else:
        with pytest.raises(RuntimeError):
            door.ask(f"/gradio_api/file={path}")


@pytest.mark.parametrize(
    ("path", "length", "status"),
    [
        ("/gradio_api/queue/join", "1000000", 200),
        ("/gradio_api/queue/join", "1000001", 413),
        ("/gradio_api/queue/join", "", 411),
        ("/gradio_api/queue/join", "x", 411),
        ("/gradio_api/upload", "22000", 200),
        ("/gradio_api/upload", "22001", 413),
        ("/gradio_api/upload", "", 411),
    ],
)
def test_requests_have_a_length_and_a_limit(door, path, length, status):
    assert door.ask(path, "POST", content_length=length)[0] == status


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/queue/join", "/login"])
def test_a_length_beside_chunks_is_none(door, path):
    """The server would read the chunks, however many there are, and not look at the length."""
    assert door.ask(path, "POST", transfer_encoding="chunked")[0] == 411


@pytest.mark.parametrize("by_visitor", [True, False])
def test_an_upload_that_is_broken_off_is_no_error_of_ours(door, by_visitor):
    async def receive():
        return {"type": "http.disconnect" if by_visitor else "http.request"}

    async def fail(scope, receive, send):
        raise ConnectionError(await receive())

    door.guard._app, door.receive = fail, receive
    upload = door.open("/gradio_api/upload", "POST")
    if by_visitor:
        assert asyncio.run(upload) == []
    else:
        with pytest.raises(ConnectionError):
            asyncio.run(upload)
    assert door.guard._uploading == []


def test_passwords_cannot_be_tried_out(door):
    door.status = 400
    statuses = [door.ask("/login", "POST")[0] for _ in range(LOGINS_PER_MINUTE + 2)]
    assert statuses == [400] * LOGINS_PER_MINUTE + [429] * 2


def test_many_may_log_in(door):
    """A class at one address: their right passwords count nothing."""
    assert {door.ask("/login", "POST")[0] for _ in range(2 * LOGINS_PER_MINUTE)} == {200}


def test_uploads_under_way_take_room(door, monkeypatch):
    monkeypatch.setattr("model.web.uploads.MOST_BYTES", 30_000)

    async def two_at_once():
        tasks = [asyncio.ensure_future(door.open("/gradio_api/upload", "POST", content_length="20000")) for _ in "ab"]
        return [(await task)[0]["status"] for task in tasks]

    async def slow(scope, receive, send):
        await asyncio.sleep(0.05)
        await door.app(scope, receive, send)

    door.guard._app = slow
    assert asyncio.run(two_at_once()) == [200, 507]
    assert door.ask("/gradio_api/upload", "POST", content_length="20000")[0] == 200


def test_what_is_too_large_is_said_in_the_browsers_language(door):
    english, chinese = (
        door.ask("/gradio_api/upload", "POST", content_length="50000", accept_language=language)[2].decode()
        for language in ("en", "zh-CN")
    )
    assert english == say("en", "large_upload", megabytes=0.022)
    assert chinese == say("zh", "large_upload", megabytes=0.022)


def test_the_browser_may_ask_no_other_host(door):
    policy = door.ask("/")[1][b"content-security-policy"].decode()
    assert "http" not in policy
    assert "*" not in policy
    assert policy.startswith("default-src 'self'")


def test_an_upload_gets_a_path_that_cannot_be_guessed(door):
    folder = door.uploads.path / "hash"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    door.stored = json.dumps([str(folder / "a.png")]).encode()
    status, headers, body = door.ask("/gradio_api/upload", "POST")
    assert status == 200
    assert int(headers[b"content-length"]) == len(body)
    (path,) = json.loads(body)
    assert path.endswith("/a.png")
    assert not folder.exists()
    assert door.uploads.find(path) is not None


@pytest.mark.parametrize("body", [b"too large", b'{"detail":"Not authenticated"}'])
def test_an_upload_that_gradio_refuses_is_passed_on(door, body):
    door.stored, door.status = body, 401
    status, _, answer = door.ask("/gradio_api/upload", "POST")
    assert (status, answer) == (401, body)
    assert [path.name for path in door.uploads.path.rglob("*")] == ["own"]


def test_a_page_that_closes_is_noticed(door):
    door.visitors.enter("k1")
    cookie = door.ask("/")[1][b"set-cookie"].decode().split(";")[0]
    browser = cookie.split("=")[1]
    for name in ("mine", "theirs"):
        (door.uploads.path / name).mkdir()
        Image.new("RGB", (4, 4)).save(door.uploads.path / name / "a.png")
    mine = door.uploads.adopt(str(door.uploads.path / "mine/a.png"), browser)
    theirs = door.uploads.adopt(str(door.uploads.path / "theirs/a.png"), "another")

    async def open_and_close():
        task = asyncio.ensure_future(door.open("/gradio_api/heartbeat/k1", cookie=cookie))
        await asyncio.sleep(0.05)
        assert door.visitors.find("k1") is not None
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(open_and_close())
    assert door.visitors.find("k1") is None
    assert door.uploads.find(mine) is None
    assert door.uploads.find(theirs) is not None


def test_two_pages_of_one_browser(door):
    async def open_two_close_one():
        tasks = [
            asyncio.ensure_future(door.open(f"/gradio_api/heartbeat/{key}", cookie="web_demo_page=b")) for key in "xy"
        ]
        await asyncio.sleep(0.05)
        (door.uploads.path / "h").mkdir()
        Image.new("RGB", (4, 4)).save(door.uploads.path / "h/a.png")
        path = door.uploads.adopt(str(door.uploads.path / "h/a.png"), "b")
        tasks[0].cancel()
        await asyncio.wait(tasks[:1])
        assert door.uploads.find(path) is not None, "the other page may still ask about it"
        tasks[1].cancel()
        await asyncio.wait(tasks)
        assert door.uploads.find(path) is None

    asyncio.run(open_two_close_one())


@pytest.mark.parametrize("cookie", ["web_demo_page=" + "x" * 5000, "=;;;", "web_demo_page", 'a="\\'])
def test_odd_cookies(door, cookie):
    assert door.ask("/", cookie=cookie)[0] == 200
