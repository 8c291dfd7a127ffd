"""The page, in Gradio: what is on it, and which part of `Talk` each thing calls.

No function of the server takes a file from the page: the question box is handed over as text, and `Talk` opens what it
names only if that is an upload. So a program that calls the server directly gets no further than the page does.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr

from .limits import SAMPLING
from .messages import ESCAPED
from .questions import page_settings
from .talk import Talk, View, Who
from .uploads import thumbnail
from .words import WORDS, language_of, say

CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
_SEND = """(box, messages) => [
    JSON.stringify({...box, shown: (messages || []).length}), {text: "", files: []}
]"""
# A refused question comes back, in front of what was typed meanwhile.
_GIVE_BACK = """(refused, box) => {
    if (!refused) return [refused, box];
    const back = JSON.parse(refused), now = box || {};
    const text = [back.text, now.text].filter(Boolean).join("\\n");
    return ["", {text, files: [...back.files, ...(now.files || [])]}];
}"""
# Or a browser would not hand over the same file again: it tells of changes only.
_FORGET_FILES = """() => document.addEventListener("change", (event) => {
    if (event.target.matches("input[type=file]")) setTimeout(() => { event.target.value = ""; }, 0);
})"""
# Gradio has a question edited as Markdown; a visitor edits what was typed.
_EDIT_PLAINLY = """() => new MutationObserver(() => {
    for (const area of document.querySelectorAll("#conversation textarea:not([data-plain])")) {
        area.dataset.plain = "yes";
        area.value = area.value.replace(new RegExp(ESCAPED, "g"), "$1").replaceAll("\\u00a0", " ");
        area.dispatchEvent(new Event("input", {bubbles: true}));
    }
}).observe(document.body, {childList: true, subtree: true})""".replace("ESCAPED", json.dumps(ESCAPED))
# What is not visible is not part of the page, so that a closed camera does not go on filming.
_SHOW_CAMERA = """() => {
    const opens = !document.querySelector("#camera");
    const show = () => {
        const camera = document.querySelector("#camera");
        camera?.offsetHeight > 200 ? camera.scrollIntoView({block: "end"}) : setTimeout(show, 50);
    };
    if (opens) show();
    return {__type__: "update", visible: opens};
}"""
_SHOW_SETTINGS = "() => { document.querySelector('#settings .toggle-button').click(); }"
_ADD_PHOTO = """(photo, box) => {
    if (!photo) return [photo, box];
    const old = box || {text: "", files: []};
    const closed = {__type__: "update", value: null, visible: false};
    const file = {...photo, mime_type: "image/webp"};  // or the question box would show it as a document
    return [closed, {text: old.text || "", files: [...(old.files || []), file]}];
}"""
_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "PingFang SC", "Microsoft YaHei", "sans-serif"]


def make_theme() -> gr.themes.Base:
    """Return colours and fonts; the fonts are those of the visitor's system, none is loaded."""
    mono = ["ui-monospace", "SF Mono", "Consolas", "monospace"]
    theme = gr.themes.Soft(primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=_FONTS, font_mono=mono)
    plain = {"block_title_background_fill": "transparent", "block_title_text_color": "*body_text_color"}
    return theme.set(**plain, block_title_padding="0", block_title_text_weight="500")


def translations() -> gr.I18n:
    """Return the page's fixed texts for Gradio, which picks by the browser's language."""
    return gr.I18n(en=WORDS["en"], **{"zh-CN": WORDS["zh"]})  # `Guard` sees to the other Chinese


def who_asks(request: gr.Request) -> Who:
    """Return who is behind a request."""
    address = request.username or (request.client.host if request.client else "?")
    return Who(str(request.session_hash), address, language_of(request.headers.get("accept-language", "")))


def build_page(talk: Talk, model_lines: dict[str, str], i18n: gr.I18n) -> gr.Blocks:
    """Put the page together."""
    start = page_settings(talk.assistant, talk.limits)
    with gr.Blocks(title=_title("en"), analytics_enabled=False, fill_height=True) as page:
        gr.Markdown(i18n("title"), elem_id="heading")
        about = gr.Markdown(model_lines["en"], elem_id="model_line")
        conversation = gr.Chatbot(
            elem_id="conversation",
            label=i18n("conversation"),
            show_label=False,
            editable="user",
            buttons=["copy"],
            layout="bubble",
            sanitize_html=True,
            allow_tags=False,
            allow_file_downloads=False,
            group_consecutive_messages=False,  # in groups, Gradio 6.31 fails to edit a question with pictures
            placeholder=" ",
        )
        status = gr.HTML("", elem_id="status", container=False)
        question = gr.MultimodalTextbox(
            elem_id="question",
            label=i18n("question"),
            show_label=False,
            placeholder=str(i18n("write")),
            sources=["upload"],
            file_types=["image"],
            file_count="multiple",
            autofocus=True,
            max_plain_text_length=talk.limits.max_characters + 1,  # longer pasted text would become a file
        )
        with gr.Row(elem_id="below"):
            clear = gr.Button(i18n("new"), elem_id="clear", size="sm", min_width=80)
            settings_open = gr.Button(i18n("settings"), elem_id="settings_open", size="sm", min_width=80)
            camera_open = gr.Button(i18n("camera"), elem_id="camera_open", size="sm", min_width=80)
        camera = gr.Image(sources=["webcam"], elem_id="camera", show_label=False, height=260, visible=False)
        with gr.Sidebar(position="right", open=False, elem_id="settings"):
            settings = _settings(i18n, start, talk.limits.max_new_tokens)
        _connect(talk, settings, conversation, status, question, clear)

        async def enter(request: gr.Request) -> list[Any]:
            who = who_asks(request)
            empty, status_line = _empty_conversation(talk, who.language), talk.enter(who).status
            return [model_lines[who.language], empty, status_line]

        async def leave(request: gr.Request) -> None:
            talk.visitors.leave(str(request.session_hash))  # the page has Gradio's heartbeat for this alone

        page.unload(leave)
        page.load(None, js=_FORGET_FILES)
        page.load(None, js=_EDIT_PLAINLY)
        page.load(None, js=f"() => {{ if (/^zh/i.test(navigator.language)) document.title = '{_title('zh')}'; }}")
        page.load(enter, None, [about, conversation, status], **_QUIET)
        settings_open.click(None, js=_SHOW_SETTINGS)
        camera_open.click(None, None, camera, js=_SHOW_CAMERA)
        camera.input(None, [camera, question], [camera, question], js=_ADD_PHOTO)
    return page


def _title(language: str) -> str:
    return say(language, "title").lstrip("# ")


def _settings(i18n: gr.I18n, start: dict[str, Any], most_tokens: int) -> list[Any]:
    """Put the settings into the drawer; return their components in the order of `_NAMES`."""
    gr.Markdown(i18n("settings"), elem_id="settings_title")
    gr.Markdown(i18n("about_settings"))
    parts: list[Any] = [gr.Checkbox(start["do_sample"], label=i18n("do_sample"), elem_id="do_sample")]
    for name, (least, most) in SAMPLING.items():
        step = 1 if name == "top_k" else 0.05
        about = i18n(f"about_{name}")
        parts.append(gr.Slider(least, most, start[name], step=step, label=i18n(name), info=about, elem_id=name))
    longest = i18n("max_new_tokens")
    value = start["max_new_tokens"]
    parts.append(gr.Slider(1, most_tokens, value, step=1, label=longest, elem_id="max_new_tokens"))
    return parts


_NAMES = ("do_sample", *SAMPLING, "max_new_tokens")


def _connect(
    talk: Talk,
    settings: list[Any],
    conversation: gr.Chatbot,
    status: gr.HTML,
    question: gr.MultimodalTextbox,
    clear: gr.Button,
) -> None:
    """Say what happens when."""
    packet, refused = gr.Textbox(visible="hidden"), gr.Textbox(visible="hidden")

    def named(values: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(_NAMES, values, strict=True))

    async def ask(request: gr.Request, text: Any, *values: Any) -> AsyncIterator[list[Any]]:
        async for view in talk.ask(who_asks(request), text, named(values)):
            yield show(view)

    async def retry(request: gr.Request, *values: Any) -> AsyncIterator[list[Any]]:
        async for view in talk.retry(who_asks(request), named(values)):
            yield show(view)

    async def edit(request: gr.Request, event: gr.EventData, *values: Any) -> AsyncIterator[list[Any]]:
        data = event._data if isinstance(event._data, dict) else {}
        async for view in talk.edit(who_asks(request), data.get("index"), data.get("value"), named(values)):
            yield show(view)

    async def example(request: gr.Request, event: gr.EventData, *values: Any) -> AsyncIterator[list[Any]]:
        data = event._data if isinstance(event._data, dict) else {}
        async for view in talk.ask_example(who_asks(request), data.get("index"), named(values)):
            yield show(view)

    async def stop(request: gr.Request) -> None:
        talk.stop(who_asks(request))

    async def begin_again(request: gr.Request) -> list[Any]:
        return show(talk.clear(who_asks(request)))

    shown, quiet = [conversation, status, question, refused], _QUIET
    sent = question.submit(None, [question, conversation], [packet, question], js=_SEND)
    # "multiple": also while an answer comes, when the question is refused; "once" would lose it.
    asked = sent.then(ask, [packet, *settings], shown, trigger_mode="multiple", **quiet)
    asked.then(None, [refused, question], [refused, question], js=_GIVE_BACK)
    conversation.retry(retry, settings, shown, **quiet)
    conversation.edit(edit, settings, shown, **quiet)
    conversation.example_select(example, settings, shown, **quiet)
    question.stop(stop, None, None, **quiet)
    gr.on([clear.click, conversation.clear], begin_again, None, shown, **quiet)


def show(view: View) -> list[Any]:
    """Return what a view changes: the conversation, the line below it, the question box's button, a refused question.

    What is in the box is never changed from here: the visitor may be typing.
    """
    messages = gr.skip() if view.messages is None else view.messages
    buttons = gr.MultimodalTextbox(submit_btn=not view.running, stop_btn=view.running)
    status = gr.skip() if view.status is None else view.status
    return [messages, status, buttons, gr.skip() if view.box is None else json.dumps(view.box)]


def _empty_conversation(talk: Talk, language: str) -> Any:
    """Return the chatbot with its examples and invitation in a language."""
    placeholder = f"### {say(language, 'placeholder')}\n{say(language, 'ways')}"
    return gr.Chatbot(value=[], placeholder=placeholder, examples=_examples(talk, language))


def _examples(talk: Talk, language: str) -> list[Any]:
    examples = []
    for example in talk.examples:
        icon = thumbnail(example.icon())
        text = example.question(language)
        examples.append({"text": text, "display_text": text, "icon": {"path": icon, "url": icon}})
    return examples
