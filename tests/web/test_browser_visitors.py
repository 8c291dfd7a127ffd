"""Many visitors, those who leave, and the limits on what one may ask."""

from __future__ import annotations

import pytest
from PIL import Image
from tiny_trained import SONG
from web_page import Server, expect, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.web]

MAX_BYTES = 50_000


@pytest.fixture(scope="module")
def server(told, tmp_path_factory):
    flags = ["--max_new_tokens", 100_000, "--questions_per_minute", 1000, "--max_visitors", 10]
    flags += ["--max_picture_bytes", MAX_BYTES, "--max_pictures", 2, "--max_characters", 50]
    started = Server(tmp_path_factory.mktemp("web") / "disk", "--model_weights", told, *flags)
    yield started
    started.stop()


def test_ten_visitors_at_once_of_whom_two_leave(server, visit):
    """One leaves while waiting, one in mid-answer: places move up, an eleventh gets in, and all others are answered."""
    singer, *others = [visit(server) for _ in range(10)]
    late = visit(server)
    expect(late.error).to_contain_text("10")
    singer.ask(SONG)
    singer.hear_growing()
    for number, visitor in enumerate(others, 1):
        visitor.ask("Hello")
        assert visitor.place() == number
    others.pop(3).leave()
    wait_for(lambda: others[-1].place() == 8, "the last to move up")
    for _ in range(2):  # with each reload, its page gives a place back and takes another
        wait_for(lambda: gets_in(late), "a place for one more")
        wait_for(lambda: late.place() == 9, "its position, after the others")
    singer.leave()
    for visitor in (*others, late):
        visitor.hear("Hello, visitor.")
        expect(visitor.waiting).to_have_count(0)


def gets_in(visitor) -> bool:
    """Reload the page and ask; return whether that was accepted."""
    visitor.reload()
    visitor.ask("Hello")
    wait_for(lambda: visitor.error.is_visible() or visitor.waiting.is_visible(), "an answer to the reload")
    return visitor.waiting.is_visible()


def unusable(folder, kind):
    """A file that is no picture, one with too many bytes, or one with too many pixels."""
    file = folder / "picture.png"
    if kind == "broken":
        file.write_bytes(b"\x89PNG\r\n\x1a\n, or so it says")
    elif kind == "bytes":
        Image.effect_noise((300, 300), 90).save(file)
    else:
        Image.new("1", (10_001, 10_000)).save(file)
    assert (file.stat().st_size > MAX_BYTES) == (kind == "bytes")
    return file


@pytest.mark.parametrize("kind", ["broken", "bytes", "pixels"])
def test_a_picture_that_can_not_be_used(server, visit, colours, tmp_path, kind):
    """It is refused in a line that does not say where the server keeps it, and the next question is answered."""
    visitor = visit(server)
    visitor.ask("Which colour?", unusable(tmp_path, kind))
    expect(visitor.error).to_contain_text("picture.png")
    assert str(server.folder) not in visitor.page.content()
    expect(visitor.answers).to_have_count(0)
    visitor.reload()
    visitor.ask("Which colour?", colours["red"])
    visitor.hear("It is red.")


def test_too_many_pictures_and_too_many_words(server, visit, colours):
    visitor = visit(server)
    visitor.ask("Which colours?", colours["red"], colours["green"], colours["blue"])
    expect(visitor.error).to_contain_text("2")
    visitor.reload()
    visitor.ask("Hello" * 11)
    expect(visitor.error).to_contain_text("50")
    expect(visitor.answers).to_have_count(0)


def test_nothing_of_a_visitor_stays_on_disk(server, visit, colours):
    visitor, hesitant, same = visit(server), visit(server), visit(server)
    before = set(server.files())
    visitor.ask("Which colour?", colours["red"])
    visitor.hear("It is red.")
    hesitant.attach(colours["green"])
    same.attach(colours["red"])
    visitor.leave()
    hesitant.leave()
    wait_for(lambda: not any("green" in path.name for path in server.files()), "an unsent picture to be deleted")
    same.ask("Which colour?")  # it is not the file of the one who has left
    same.hear("It is red.")
    same.leave()
    wait_for(lambda: set(server.files()) <= before, "all files to be deleted")
