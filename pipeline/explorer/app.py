"""The page itself, on Gradio: what a visitor types and presses, and which view comes of it."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported

import gradio as gr

from pipeline.errors import CrossrayError
from pipeline.explorer import pages
from pipeline.explorer.address import ORDERS, VIEWS, View, address, is_too_long, view_of
from pipeline.explorer.source import Explored
from pipeline.explorer.steering import MAX_RANDOM, MAX_TOKENS
from pipeline.explorer.views import Views

_FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
_MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "monospace")
_VISITORS = 8
"""Of one view at the same time; more of them wait."""
_MAX_LETTERS = 100_000
"""Of a typed text."""
_FOLLOW = """
element.addEventListener('click', (event) => {
  const link = event.target.closest('a[data-view]');
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  event.preventDefault();
  trigger('click', {query: link.getAttribute('href')});
});
"""
"""Links between views are followed in place; with a key held down they open as any link does."""
_HEAD = "<script>window.addEventListener('popstate', () => location.reload());</script>"
_SHOW_ADDRESS = "(query) => { if (query && query !== location.search) history.pushState(null, '', query); }"
_SAVE = """(page, name) => {
  if (!page) return;
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([page], {type: 'text/html'}));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}"""
_CSS = """
body { color-scheme: light; }
body.dark { color-scheme: dark; }
.gradio-container { max-width: 80rem !important; margin: 0 auto !important; }
footer { display: none !important; }
"""


class _Inputs(NamedTuple):
    """Components that set a View's fields of the same names."""

    crosscoder: Any
    text: Any
    order: Any
    latent: Any
    condition: Any
    fires: Any
    silent: Any
    token: Any
    prompt: Any
    steer: Any
    tokens: Any
    temperature: Any
    random: Any


_FIELDS = {
    "text": ("crosscoder", "text", "order"),
    "latent": ("crosscoder", "latent"),
    "find": ("crosscoder", "condition", "fires", "silent", "token"),
    "steer": ("crosscoder", "prompt", "steer", "tokens", "temperature", "random"),
}
"""Inputs of each view."""


class _Tab(NamedTuple):
    """A view's inputs, by field, with the button that asks for it and where it is shown."""

    inputs: dict[str, Any]
    button: Any
    shown: Any


def build(explored: Explored) -> gr.Blocks:
    """The application over a run."""
    run = explored.run
    about = {"name": run.name, "base": run.labels[0], "chat": run.labels[1], "layer": run.origin.layer}
    head = pages.head_html(**about, created=run.created, has_models=explored.has_models)
    with gr.Blocks(title=f"{run.name}, crossray", analytics_enabled=False) as blocks:
        with gr.Row(equal_height=True):
            gr.HTML(head, apply_default_css=False, min_width=300)
            crosscoder = gr.Dropdown(
                list(run.crosscoders), value=run.crosscoders[0], label="crosscoder", scale=0, min_width=180
            )
            save = gr.Button("Save view as HTML", scale=0, min_width=170, size="sm")
        with gr.Tabs() as tabs:
            made = {"text": _text_tab(), "latent": _latent_tab(), "find": _find_tab()}
            made["steer"], stop = _steer_tab()
        shown = gr.Textbox(visible="hidden", elem_id="address")
        inputs = _Inputs(crosscoder, **{name: own for tab in made.values() for name, own in tab.inputs.items()})
        events = _Events(Views(explored), run.name)
        events.wire(blocks, inputs, made, tabs, shown)
        stop.click(events.stop, None, None, queue=False)
        file, name = gr.Textbox(visible="hidden"), gr.Textbox(visible="hidden")
        saved = save.click(events.export, [shown, *(tab.shown for tab in made.values())], [file, name])
        saved.then(None, [file, name], None, js=_SAVE)
    blocks.queue(default_concurrency_limit=_VISITORS)
    return blocks


def launch(blocks: gr.Blocks, *, host: str, port: int | None, is_allowed: Callable[[str, str], bool] | None) -> str:
    """Starts the server and returns where it is. OSError where the interface or the port is not to be had."""
    _, url, _ = blocks.launch(
        server_name=host,
        server_port=port,
        auth=is_allowed,
        auth_message="Any name; the password is the token that `crossray explore` printed or was given.",
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        _frontend=False,  # else it asks itself over HTTP first, which a proxy or a busy machine makes fail
        footer_links=[],
        theme=gr.themes.Default(font=_FONT, font_mono=_MONO),
        css=f"{_CSS}{pages.style()}",
        head=_HEAD,
    )
    return str(url)


def _shown() -> gr.HTML:
    return gr.HTML("", apply_default_css=False, js_on_load=_FOLLOW)


def _asking(text: str) -> gr.Button:
    """The button that asks for a view; it works once the page's address is read (_Events.opened)."""
    return gr.Button(text, variant="primary", scale=0, min_width=140, interactive=False)


def _text_tab() -> _Tab:
    with gr.Tab("Text", id="text"):
        text = gr.Textbox(
            label="text or dialogue",
            lines=4,
            max_lines=16,
            max_length=_MAX_LETTERS,
            placeholder="Type a text, or a dialogue with lines that begin with User: and Assistant:",
        )
        with gr.Row(equal_height=True):
            names = {"verdict": "chat-specific first", "share": "share of the largest f", "activation": "f"}
            order = gr.Dropdown(
                [(names[own], own) for own in ORDERS], value="verdict", label="order of latents", scale=0, min_width=220
            )
            button = _asking("Read")
        return _Tab({"text": text, "order": order}, button, _shown())


def _latent_tab() -> _Tab:
    with gr.Tab("Latent", id="latent"):
        with gr.Row(equal_height=True):
            latent = gr.Number(label="latent", value=None, precision=0, minimum=0, scale=0, min_width=160)
            button = _asking("Open")
        return _Tab({"latent": latent}, button, _shown())


def _find_tab() -> _Tab:
    with gr.Tab("Find", id="find"):
        condition = gr.Textbox(
            label="number, conditions, words",
            placeholder='nu_r<0.3 and frequency>0.1%, verdict="stronger in chat", 12',
        )
        with gr.Row():
            fires = gr.Textbox(label="fires on this text", max_length=_MAX_LETTERS)
            silent = gr.Textbox(label="but not on this", max_length=_MAX_LETTERS)
            token = gr.Textbox(label="on this token", scale=0, min_width=160)
        button = _asking("Find")
        return _Tab({"condition": condition, "fires": fires, "silent": silent, "token": token}, button, _shown())


def _steer_tab() -> tuple[_Tab, Any]:
    """The tab and its stop button."""
    with gr.Tab("Steer", id="steer"):
        prompt = gr.Textbox(label="what a user says, or a dialogue", lines=2, max_length=_MAX_LETTERS)
        with gr.Row():
            steer = gr.Textbox(label="latents and scales", placeholder="12=1, 40=-0.5")
            tokens = gr.Slider(1, MAX_TOKENS, value=48, step=1, label="new tokens, at most")
            temperature = gr.Slider(0, 2, value=0, step=0.1, label="temperature")
            random = gr.Slider(0, MAX_RANDOM, value=0, step=1, label="random controls")
        with gr.Row():
            button = _asking("Answer")
            stop = gr.Button("Stop", variant="stop", scale=0, min_width=140)
        named = {"prompt": prompt, "steer": steer, "tokens": tokens, "temperature": temperature, "random": random}
        return _Tab(named, button, _shown()), stop


class _Events:
    """What a press, a followed link and an opened address do."""

    def __init__(self, views: Views, run: str) -> None:
        self.views, self.run = views, run

    def wire(self, blocks: gr.Blocks, inputs: _Inputs, made: dict[str, _Tab], tabs: Any, shown: Any) -> None:
        """Connects the components; `shown` holds the address of what is shown."""
        pushed: dict[str, Any] = {"fn": None, "inputs": [shown], "outputs": None, "js": _SHOW_ADDRESS}
        everything = [tabs, shown, *inputs, *(tab.shown for tab in made.values())]
        for name in ("text", "latent", "find"):
            tab, asked = made[name], self.asking(name)
            events = [tab.button.click]
            events += [
                own.input if field == "order" else own.submit
                for field, own in tab.inputs.items()
                if field != "text"  # there a line break is part of the text
            ]
            for event in events:
                event(asked, list(inputs), [tab.shown, shown]).then(**pushed)
        # A visitor who turns to another crosscoder sees the view that is open through it.
        inputs.crosscoder.input(self.through, [inputs.crosscoder, shown], everything).then(**pushed)
        for tab in made.values():
            tab.shown.click(self.followed, list(inputs), everything).then(**pushed)
        blocks.load(self.opened, None, [*everything, *(tab.button for tab in made.values())])
        steer = made["steer"]
        steer.button.click(self.answers, list(inputs), [steer.shown, shown]).then(**pushed)

    def asking(self, name: str) -> Callable[..., tuple[str, str]]:
        """The function of a tab's button: the view, and its address."""

        def asked(*values: Any) -> tuple[str, str]:
            view = _view(name, values)
            return self.views.html(view), address(view)

        return asked

    def answers(self, request: gr.Request, *values: Any) -> Iterator[tuple[str, str]]:
        """The steering view while answers are written."""
        view = _view("steer", values)
        for html in self.views.answers(view, str(request.session_hash)):
            yield html, address(view)

    def stop(self, request: gr.Request) -> None:
        """Ends the visitor's answers."""
        self.views.stop(str(request.session_hash))

    def followed(self, event: gr.EventData, *values: Any) -> tuple[Any, ...]:
        """What a link between views leads to; texts that are too long for a link are those that are typed."""
        typed = {field: value for field, value in zip(_Inputs._fields, values, strict=True) if is_too_long(value)}
        return self._everything(typed | dict(parse_qsl(str(event.query).removeprefix("?"))))

    def opened(self, request: gr.Request) -> tuple[Any, ...]:
        """What an address leads to. What it does not name a visitor may have typed by now, and stays as it is.

        Buttons work from here on: an answer to what was asked before would be of another view or crosscoder.
        """
        query = dict(request.query_params)
        buttons = [gr.update(interactive=True) for _ in VIEWS]
        if not query:
            return (*(gr.skip() for _ in range(2 + len(_Inputs._fields) + len(VIEWS))), *buttons)
        tabs, shown, *rest = self._everything(query)
        inputs, views = rest[: len(_Inputs._fields)], rest[len(_Inputs._fields) :]
        named = {*query, "crosscoder"}
        kept = [own if field in named else gr.skip() for field, own in zip(_Inputs._fields, inputs, strict=True)]
        return (tabs, shown, *kept, *views, *buttons)

    def through(self, crosscoder: str, shown: str) -> tuple[Any, ...]:
        """The open view through another crosscoder."""
        query = dict(parse_qsl((shown or "").removeprefix("?")))
        return self._everything({**query, "crosscoder": crosscoder, "page": "0"})

    def export(self, shown: str, *htmls: str) -> tuple[str, str]:
        """The open view as a page of its own, and the name of its file; empty where nothing is shown."""
        view = view_of(dict(parse_qsl((shown or "").removeprefix("?"))))
        content = htmls[VIEWS.index(view.view)]
        return (
            (pages.exported(content, f"{self.run}, crossray"), f"{self.run}-{view.view}.html") if content else ("", "")
        )

    def _everything(self, query: dict[str, str]) -> tuple[Any, ...]:
        """Values of the tabs, the address, all inputs and all views; those of other views stay as they are."""
        try:
            view = view_of(query)
            crosscoder = self.views.explored.crosscoder_name(view.crosscoder)
        except CrossrayError as error:
            wrong = [pages.fault_html(str(error)), *(gr.skip() for _ in VIEWS[1:])]
            return (gr.update(selected=VIEWS[0]), "", *(gr.skip() for _ in _Inputs._fields), *wrong)
        given = {**view._asdict(), "crosscoder": crosscoder}
        inputs = [given[field] if field in _FIELDS[view.view] else gr.skip() for field in _Inputs._fields]
        shown = [self.views.html(view) if name == view.view else gr.skip() for name in VIEWS]
        return (gr.update(selected=view.view), address(view), *inputs, *shown)


def _view(name: str, values: Sequence[Any]) -> View:
    """The view of a tab from the values of all inputs; inputs of other tabs are left out of it."""
    given = dict(zip(_Inputs._fields, values, strict=True))
    return View(view=name, **{field: given[field] for field in _FIELDS[name] if given[field] is not None})
