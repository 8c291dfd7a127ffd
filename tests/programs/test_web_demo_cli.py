"""web_demo.py as people start and end it; what its page does is tested elsewhere."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from tiny_run import ROOT, environment, one_line_error

import web_demo
from model.web import serving

needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="gradio is missing: pip install -r web-requirements.txt"
)


def refusal(capsys, *flags: object) -> str:
    capsys.readouterr()
    assert web_demo.main([*map(str, flags)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    return one_line_error(err, "web_demo.py")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), ["--model_weights"]),
        (("--model_weights", "no/such/folder"), ["no/such/folder"]),
        (("--model_weights", "x", "--max_visitors", "0"), ["--max_visitors", "0"]),
        (("--model_weights", "x", "--questions_per_minute", "-1"), ["--questions_per_minute"]),
        (("--model_weights", "x", "--temperature", "0"), ["--temperature"]),
        (("--model_weights", "x", "--port", "web"), ["--port"]),
        (("--model_weights", "x", "--nonsense"), ["--nonsense"]),
        (("--model_weights", "x", "--image_path", "y"), ["--image_path"]),
    ],
)
def test_mistakes_are_one_line_before_gradio_is_loaded(capsys, flags, words):
    loaded = "gradio" in sys.modules
    line = refusal(capsys, *flags)
    assert all(word in line for word in words)
    assert ("gradio" in sys.modules) == loaded


def test_a_port_in_use(capsys, trained):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert str(port) in refusal(capsys, "--model_weights", trained, "--port", port)
    for flags in (("--port", 70000), ("--host", "999.1.1.1"), ("--port", -5)):
        assert str(flags[1]) in refusal(capsys, "--model_weights", trained, *flags)


def test_requests_to_this_machine_go_through_no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "example.org")
    serving.reach_without_proxy("192.168.1.5")
    for host in ("127.0.0.1", "localhost", "192.168.1.5", "example.org"):
        assert urllib.request.proxy_bypass(host), host
    assert not urllib.request.proxy_bypass("example.com")


@pytest.mark.parametrize("version", [None, "4.44.1", "5.49.0"])
def test_gradio_missing_or_too_old(capsys, monkeypatch, trained, version):
    def installed(name):
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    assert "pip install -r web-requirements.txt" in refusal(capsys, "--model_weights", trained, "--port", 0)


@pytest.mark.parametrize("text", ["anna", "anna:", ":{file}", "anna:{folder}", "anna:{folder}/none", "anna:{empty}"])
def test_auth_that_cannot_work(capsys, trained, tmp_path, text):
    (tmp_path / "file").write_text("secret\n")
    (tmp_path / "empty").write_text("\nsecret\n")
    auth = text.format(file=tmp_path / "file", folder=tmp_path, empty=tmp_path / "empty")
    line = refusal(capsys, "--model_weights", trained, "--port", 0, "--auth", auth)
    assert "--auth" in line
    assert "secret" not in line


def test_the_password_is_the_first_line_of_its_file(tmp_path):
    file = tmp_path / "file"
    file.write_text("päss wörd\r\nmore\n", encoding="utf-8")
    is_right = serving.read_login(f"anna:{file}")
    assert is_right("anna", "päss wörd")
    for user, password in (("anna", ""), ("Anna", "päss wörd"), ("", "päss wörd"), ("anna", "päss wörd\n"), ("b", "x")):
        assert not is_right(user, password)


@contextlib.contextmanager
def running(trained, folder: Path, *flags: object):
    """Start the program; yield it and its address once it is ready."""
    command = [sys.executable, "web_demo.py", "--model_weights", trained, "--device", "cpu", "--port", "0", *flags]
    env = environment(TMPDIR=str(folder))
    with subprocess.Popen([*map(str, command)], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stderr:
                if ready := re.search(r"ready: (http://\S+)", line):
                    break
            else:
                pytest.fail("the program ended before it was ready")
            yield process, ready[1]
        finally:
            process.kill()


@needs_gradio
@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_it_serves_its_page_and_ends_clean(trained, tmp_path, monkeypatch, number, status):
    """Also where a proxy is set that knows nothing of this machine, and when its terminal is closed."""
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    password = tmp_path / "password"
    password.write_text("secret\n")
    password.chmod(0o600)
    folder = tmp_path / "tmp"
    folder.mkdir()
    with running(trained, folder, "--auth", f"anna:{password}") as (process, url):
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=60) as page:
            assert page.status == 200
            assert b"googleapis" not in page.read()
        assert [path for path in folder.rglob("*") if path.is_file()] == []
        process.send_signal(number)
        assert process.wait(60) == status
        rest = process.stderr.read()
    assert "Traceback" not in rest
    assert "secret" not in rest
    assert [*folder.iterdir()] == []
