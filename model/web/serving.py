"""From a loaded model to a page that is there until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import contextlib
import hmac
import importlib.metadata
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from .limits import Limits

logger = logging.getLogger(__name__)

_SWEEP_SECONDS = 60
_ENVIRONMENT = {  # before Gradio is imported: it asks its maker for news, and keeps records, unless told otherwise
    "GRADIO_ANALYTICS_ENABLED": "False",
    "GRADIO_RUN_HISTORY": "False",
    "GRADIO_MCP_SERVER": "False",
    "GRADIO_SHARE": "False",
    "GRADIO_HEARTBEAT_INTERVAL": "2",  # seconds until an idle connection notices that the program ends
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def check_installed() -> None:
    """Refuse to start without Gradio 6.

    Raises:
        ValueError: with the command that installs it.
    """
    found = "missing"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found = importlib.metadata.version("gradio")
    if not found.startswith("6."):
        raise ValueError(f"gradio: {found}, expected 6; install it: pip install -r web-requirements.txt")


def check_port(host: str, port: int) -> int:
    """Return the port, or a free one for 0.

    Raises:
        ValueError: if another program listens there, or there is no such address.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port {port}: must be from 0, for a free one, to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no such host"
        raise ValueError(
            f"--host {host} --port {port}: {reason}; give another --host, or another --port (0: a free one)"
        ) from None


def read_login(text: str) -> Callable[[str, str], bool]:
    """Return what checks a user and a password against `USER:PASSWORD_FILE`.

    Raises:
        ValueError: if the user is missing, or the file is unreadable or has no password in its first line.
    """
    user, colon, file = text.partition(":")
    if not user or not colon or not file:
        raise ValueError("--auth: expected USER:PASSWORD_FILE, the password in the first line of a file")
    try:
        password = Path(file).read_text(encoding="utf-8").split("\n", 1)[0].rstrip("\r")
        if Path(file).stat().st_mode & 0o044:
            logger.warning("--auth: others on this machine may read %s; chmod 600 it", file)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--auth: {file} can't be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None
    if not password.strip():
        raise ValueError(f"--auth: the first line of {file} is empty; write a password there")

    def is_right(given_user: str, given_password: str) -> bool:
        right_user = hmac.compare_digest(given_user.encode(), user.encode())
        return hmac.compare_digest(given_password.encode(), password.encode()) and right_user

    return is_right


def reach_without_proxy(host: str) -> None:
    """Have requests to this machine go through no proxy: Gradio asks its own page whether it is there."""
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost", host]))


def end_on_signals() -> None:
    """Have SIGTERM, and SIGHUP of a terminal that closes, end the program as Ctrl-C does; `nohup` stays in force."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def serve(args: argparse.Namespace, assistant: Any, limits: Limits) -> None:
    """Show the page until the program is told to end; delete what visitors left, however that comes."""
    from .talk import Talk
    from .uploads import UploadFolder

    end_on_signals()
    reach_without_proxy(args.host)
    uploads = UploadFolder()
    os.environ.update(_ENVIRONMENT, GRADIO_TEMP_DIR=str(uploads.path))
    talk: Talk | None = None
    page: Any = None
    try:
        from starlette.middleware import Middleware

        from .about_model import model_line
        from .examples import make_examples
        from .guard import Guard
        from .page import CSS, build_page, make_theme, translations

        talk = Talk(assistant, limits, uploads, make_examples())
        lines = {language: model_line(assistant, args.model_weights, language) for language in ("en", "zh")}
        i18n = translations()
        page = build_page(talk, lines, i18n)
        page.queue(max_size=None, default_concurrency_limit=None, api_open=False)
        _, local, shared = page.launch(
            server_name=args.host,
            server_port=args.port,
            share=args.share,
            auth=args.login,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            ssr_mode=False,
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            footer_links=[],
            max_threads=2 * limits.max_visitors + 20,
            state_session_capacity=2 * limits.max_visitors + 20,
            app_kwargs={"middleware": [Middleware(Guard, limits=limits, visitors=talk.visitors, uploads=uploads)]},
            theme=make_theme(),
            css=CSS,
            i18n=i18n,
        )
        logger.info("web_demo.py: ready: %s", shared or local)
        while True:
            threading.Event().wait(_SWEEP_SECONDS)
            talk.sweep()
    finally:
        if talk is not None:
            talk.engine.close()
        if page is not None:
            page.close(verbose=False)
        uploads.close()


def _end(number: int, frame: FrameType | None) -> None:
    for other in (signal.SIGTERM, signal.SIGHUP):  # a second one must not cut the tidying short
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)
