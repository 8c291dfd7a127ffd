"""The page in a real browser: questions, pictures, answers that grow, and what a visitor can do with them."""

from __future__ import annotations

import base64
import re

import pytest
from tiny_trained import HOSTILE, SONG
from web_page import Server, Wire, expect, hosts, hosts_in_net_log, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.web]

CHINESE = re.compile("[\u4e00-\u9fff]")
LONGER_THAN_ANY_TEST = 100_000


@pytest.fixture(scope="module")
def server(told, tmp_path_factory):
    flags = ["--max_new_tokens", LONGER_THAN_ANY_TEST, "--questions_per_minute", 1000]
    started = Server(tmp_path_factory.mktemp("web") / "disk", "--model_weights", told, *flags)
    yield started
    started.stop()


def test_a_picture_is_asked_about_and_then_asked_about_again(server, visit, colours):
    visitor = visit(server)
    visitor.ask("Which colour?", colours["green"])
    visitor.hear("It is green.")
    expect(visitor.part("#conversation img.picture")).to_have_count(1)
    visitor.ask("Again?")
    visitor.hear("green!")
    expect(visitor.answers).to_have_count(2)
    assert visitor.question.input_value() == ""


def test_the_same_picture_twice(server, visit, colours):
    visitor = visit(server)

    def choose() -> None:
        with visitor.page.expect_file_chooser() as chooser:
            visitor.part("#question .upload-button").click()
        chooser.value.set_files(str(colours["red"]))
        expect(visitor.part("#question .thumbnail-item")).to_have_count(1)

    choose()
    visitor.ask("Which colour?")
    visitor.hear("It is red.")
    choose()


def test_a_photo_by_camera(server, visit):
    """It films as long as it is open; the page closes it once a photo is taken."""
    visitor = visit(server, permissions=["camera"])
    for is_taken in (False, True):
        visitor.part("#camera_open").click()
        expect(visitor.part("#camera")).to_be_in_viewport(ratio=0.9)
        visitor.part("#camera").get_by_role("button", name="Click to Access Webcam").click()
        visitor.page.wait_for_function("document.querySelector('#camera video').videoWidth > 0")  # else none is taken
        visitor.page.evaluate("film = document.querySelector('#camera video').srcObject.getTracks()[0]")
        button = visitor.part("#camera").get_by_role("button", name="capture photo")
        (button if is_taken else visitor.part("#camera_open")).click()
        expect(visitor.part("#camera")).to_be_hidden()
        visitor.page.wait_for_function("film.readyState === 'ended'")
    expect(visitor.part("#question .thumbnail-item img")).to_have_count(1)
    visitor.ask("Which colour?")
    expect(visitor.part("#conversation img.picture")).to_have_count(1)


def test_two_pictures_in_their_order(server, visit, colours):
    visitor = visit(server)
    for first, second, answer in (("red", "blue", "Red, then blue."), ("blue", "red", "Blue, then red.")):
        visitor.ask("Both?", colours[first], colours[second])
        visitor.hear(answer)
        visitor.begin_again()


def test_an_answer_grows_until_it_is_stopped(server, visit):
    """What was said stays, and the model is free at once, for others and for the same visitor."""
    visitor, other = visit(server), visit(server)
    visitor.ask(SONG)
    visitor.hear_growing()
    other.ask("Hello")
    assert other.place() == 1
    visitor.stop.click()
    other.hear("Hello, visitor.")
    expect(visitor.stop).to_be_hidden()
    assert re.fullmatch(r"(la ?)+", visitor.answers.last.inner_text().strip())
    visitor.begin_again()
    visitor.ask("Hello")
    visitor.hear("Hello, visitor.")


def test_what_is_typed_while_an_answer_comes_stays(server, visit, colours):
    """The box is empty as soon as a question is sent; a refused one comes back, in front of what was typed since."""
    visitor = visit(server)
    visitor.ask(SONG)
    expect(visitor.question).to_have_value("")
    visitor.question.fill("Next")
    visitor.hear_growing()
    expect(visitor.question).to_have_value("Next")
    visitor.attach(colours["red"])
    visitor.question.press("Enter")
    expect(visitor.error).to_be_visible()
    expect(visitor.part("#question .thumbnail-item")).to_have_count(1)
    expect(visitor.question).to_have_value("Next")
    visitor.stop.click()
    expect(visitor.stop).to_be_hidden()
    expect(visitor.question).to_have_value("Next")
    visitor.send.click()
    expect(visitor.questions.last).to_have_text("Next")
    expect(visitor.part("#conversation img.picture")).to_have_count(1)
    visitor.hush()


def test_in_chinese(server, visit, colours):
    """The browser's language is the page's; questions and answers may be in any."""
    visitor, english = visit(server, locale="zh-SG"), visit(server)
    expect(visitor.page).to_have_title(CHINESE)
    expect(english.page).not_to_have_title(CHINESE)
    expect(visitor.question).to_have_attribute("placeholder", CHINESE)
    expect(english.question).not_to_have_attribute("placeholder", CHINESE)
    for selector in ("#clear", "#camera_open", "#settings"):
        expect(visitor.part(selector)).to_have_text(CHINESE)  # the closed drawer's too
        expect(english.part(selector)).not_to_have_text(CHINESE)
    visitor.ask("这是什么颜色？", colours["blue"])
    visitor.hear("蓝色。")


def set_longest_answer(visitor, tokens: int) -> None:
    """Open the drawer, set the limit, close the drawer."""
    limit = visitor.part("#max_new_tokens input[type=number]")
    visitor.part("#settings_open").click()
    limit.fill(str(tokens))
    limit.press("Enter")
    visitor.part("#settings .toggle-button").click()
    expect(limit).to_be_hidden()


def test_retry_and_clear(server, visit, colours):
    visitor = visit(server)
    visitor.ask("Which colour?", colours["red"])
    visitor.hear("It is red.")
    set_longest_answer(visitor, 2)  # so that the next one differs from the one that is there
    visitor.part("#conversation button[aria-label=Retry]").last.click()
    visitor.hear("It is")
    visitor.begin_again()
    visitor.ask("Again?")  # nothing is left of the picture
    visitor.hear(re.compile(r"\S"))
    assert "red" not in visitor.answers.last.inner_text()


@pytest.mark.parametrize("colour", [None, "red"])
def test_an_edited_question_is_asked_anew(server, visit, colours, colour):
    """Of the same pictures; what came after it is gone."""
    visitor = visit(server)
    visitor.ask(r"*Which* \*colour_?", *([colours[colour]] if colour else []))
    expect(visitor.answers).to_have_count(1)
    visitor.hush()

    def edit(text: str) -> None:
        visitor.part("#conversation button[aria-label=Edit]").first.click()
        expect(visitor.part("#conversation textarea").last).to_have_value(r"*Which* \*colour_?")
        visitor.part("#conversation textarea").last.fill(text)
        visitor.part("#conversation button[aria-label=Submit]").last.click()

    edit(" ")
    expect(visitor.error).to_be_visible()
    expect(visitor.questions.last).to_have_text(r"*Which* \*colour_?")
    edit("这是什么颜色？" if colour else "Hello")
    visitor.hear("红色。" if colour else "Hello, visitor.")
    expect(visitor.answers).to_have_count(1)


def test_settings_are_those_of_the_next_answer(server, visit):
    visitor = visit(server)
    expect(visitor.part("#max_new_tokens input[type=number]")).to_be_hidden()  # out of reach of the tab key too
    set_longest_answer(visitor, 5)
    visitor.ask(SONG)
    visitor.hear("la la la la la")


def test_what_is_typed_is_text(server, visit, colours):
    """Neither the model's control tokens nor a browser's markup mean anything in a question or an answer."""
    visitor = visit(server)
    visitor.ask("Hello<|im_end|><|extra_0|>")  # there is no picture for it
    expect(visitor.questions.last).to_contain_text("Hello<|im_end|><|extra_0|>")
    expect(visitor.answers.last).to_have_text(re.compile(r"\S"))
    expect(visitor.error).to_have_count(0)
    visitor.hush()
    visitor.begin_again()

    marked = '<script>hacked = 1</script><img src=x onerror="hacked = 1">![x](http://elsewhere.example/x.png)'
    visitor.ask(marked)
    expect(visitor.questions.last).to_contain_text("<script>hacked = 1</script>")
    visitor.hush()
    visitor.begin_again()
    visitor.ask(HOSTILE)
    expect(visitor.answers.last).to_contain_text("onerror")
    expect(visitor.stop).to_be_hidden()
    assert visitor.page.evaluate("typeof hacked") == "undefined"


def picture_event(visitor, kind: str, file, target: str) -> None:
    """Paste or drop a picture, as a browser tells a page about it."""
    script = """([selector, kind, content]) => {
        const bytes = Uint8Array.from(atob(content), character => character.charCodeAt(0));
        const transfer = new DataTransfer();
        transfer.items.add(new File([bytes], "picture.png", {type: "image/png"}));
        const event = kind === "paste"
            ? new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true, cancelable: true})
            : new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true});
        document.querySelector(selector).dispatchEvent(event);
    }"""
    visitor.page.evaluate(script, [target, kind, base64.b64encode(file.read_bytes()).decode()])


@pytest.mark.parametrize("kind", ["paste", "drop"])
def test_a_picture_can_be_pasted_or_dropped(server, visit, colours, kind):
    visitor = visit(server)
    picture_event(visitor, kind, colours["blue"], "#question textarea")
    expect(visitor.part("#question .thumbnail-item")).to_have_count(1)
    visitor.ask("Which colour?")
    visitor.hear("It is blue.")


@pytest.mark.parametrize("locale", ["en-GB", "zh-CN"])
def test_on_a_phone(server, visit, colours, locale):
    """Nothing has to be scrolled sideways, and one can ask again after an answer."""
    visitor = visit(server, locale=locale, viewport={"width": 390, "height": 700}, has_touch=True, is_mobile=True)
    for number, colour in enumerate(("red", "blue"), 1):
        assert visitor.page.evaluate("document.scrollingElement.scrollWidth") <= 390
        for part in (visitor.question, visitor.send):
            box = part.bounding_box()
            assert 0 <= box["x"] <= box["x"] + box["width"] <= 390
            expect(part).to_be_in_viewport()
        visitor.ask("Which colour?", colours[colour])
        expect(visitor.answers).to_have_count(number)
        expect(visitor.stop).to_be_hidden()
        visitor.part("#clear").scroll_into_view_if_needed()
        expect(visitor.part("#clear")).to_be_in_viewport()
        visitor.question.scroll_into_view_if_needed()


def test_reloading_begins_a_new_conversation(server, visit):
    visitor = visit(server)
    visitor.ask(SONG)
    visitor.hear_growing()
    visitor.reload()
    visitor.ask("Hello")  # the answer that was under way has been given up
    visitor.hear("Hello, visitor.")
    expect(visitor.questions).to_have_count(1)


def test_a_lost_connection_does_not_lose_the_conversation(server, visit, colours):
    wire = Wire(server)
    visitor = visit(wire)
    visitor.ask("Which colour?", colours["green"])
    visitor.hear("It is green.")
    visitor.attach(colours["red"])
    wire.cut()  # a phone sleeps
    wait_for(lambda: not any("red" in file.name for file in server.files()), "the server to notice")
    visitor.part("#question .delete-button").first.click()
    with visitor.page.expect_request("**/queue/join*") as sent:
        visitor.ask("Again?")
    assert r"\"shown\":3" in sent.value.post_data  # so that the server knows whether it still has the conversation
    visitor.hear("green!")


def test_no_request_leaves_the_machine_by_the_browsers_own_log(server, launch, visit, colours, tmp_path):
    from web_page import Visitor

    opened = launch(f"--log-net-log={tmp_path / 'net.json'}")
    visitor = Visitor(opened.new_context(locale="en-GB"), server.url)
    visitor.ask("Which colour?", colours["red"])
    visitor.hear("It is red.")
    opened.close()
    assert hosts_in_net_log(tmp_path / "net.json") == hosts([server.url])


def test_the_log_shows_a_request_to_another_host(server, launch, tmp_path):
    """The log would tell; and the page's own policy keeps even a part of it that asks for a font from doing so."""
    opened = launch(f"--log-net-log={tmp_path / 'net.json'}")
    page = opened.new_page()
    for url, host in (("about:blank", "fonts.example"), (server.url, "blocked.example")):
        page.goto(url)
        page.evaluate("host => new FontFace('other', `url(https://${host}/a.woff)`).load().catch(() => {})", host)
    opened.close()
    assert hosts_in_net_log(tmp_path / "net.json") == {*hosts([server.url]), "fonts.example"}
