"""The page of `dllm serve` in a browser: canvases fill with what the server streams, settings decide what is sent."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
for needed in ("fastapi", "prometheus_client", "uvicorn"):
    pytest.importorskip(needed)

from browser_rig import FAINT, UNNAMED, asked, in_a_browser, opened, spoken, themed, width_on_a_phone  # noqa: E402
from dllm.serving.static import files  # noqa: E402
from serve_rig import QUESTION, Running, serving  # noqa: E402

pytestmark = in_a_browser
MASK = "<|mdm_mask|>"
HOLED = "Tom has 2 apples. He buys 3. We compute____= 5."
RIGHT, LEFT, HOME, END, CONTROL, ENTER, SHIFT, TAB = "\ue014\ue012\ue011\ue010\ue009\ue007\ue008\ue004"
# Requests are kept, and answered as a test says or by the server.
RECORDER = """
  window.sent = []; window.played = []; window.keys = [];
  const real = window.fetch;
  window.fetch = (path, options = {}) => {
    if (options.body) window.sent.push([path, JSON.parse(options.body)]);
    window.keys.push((options.headers ?? {}).Authorization ?? null);
    const next = options.body ? window.played.shift() : undefined;
    return next ? Promise.resolve(new Response(...next)) : real(path, options);
  };
"""
# What a reader sees of a canvas: classes, text and struck text of each position.
CELLS = """
  const answer = [...document.querySelectorAll('.answer')].at(arguments[0]);
  return [...answer.querySelectorAll('.canvas .token')].map((e) => ({
    kinds: e.className.split(' ').slice(1), text: e.firstChild.textContent, colour: e.style.backgroundColor,
    struck: e.querySelector('s')?.textContent ?? null, label: e.getAttribute('aria-label') }))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(sampler="tiny/threshold", gen_length=64, seed=0) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with opened(tmp_path_factory.mktemp("browser")) as driver:
        yield driver


@pytest.fixture
def page(browser: Any, server: Running) -> Any:
    browser.get(f"{server.url}/")
    until(browser, "!document.getElementById('send').disabled")
    browser.execute_script(RECORDER)
    return browser


def until(page: Any, condition: str) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    WebDriverWait(page, 30, 0.02).until(lambda page: page.execute_script(f"return {condition}"))


def find(page: Any, selector: str, number: int = 0) -> Any:
    return page.find_elements("css selector", selector)[number]


def ask(page: Any, text: str = QUESTION, wait: bool = True) -> None:
    """Send a text, and wait for the answers."""
    fields = [each for each in page.find_elements("css selector", "#composer textarea") if each.is_displayed()]
    fields[0].clear()
    fields[0].send_keys(text)
    find(page, "#send").click()
    if wait:
        until(page, "!document.getElementById('send').disabled")


def put(page: Any, name: str, value: Any, panel: int = 0) -> None:
    """Fill a field of the settings, as typing does."""
    page.execute_script(
        """
        const field = [...document.querySelectorAll('.panel')][arguments[2]].querySelector(`[name="${arguments[0]}"]`);
        if (field.type === 'checkbox') field.checked = arguments[1]; else field.value = arguments[1];
        field.dispatchEvent(new Event('input', { bubbles: true }));
        field.dispatchEvent(new Event('change', { bubbles: true }));
        """,
        name, value, panel,
    )  # fmt: skip


def sent(page: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(path, body) for path, body in page.execute_script("return window.sent")]


def play(page: Any, body: str, status: int = 200, **headers: str) -> None:
    """Answer the next request with this."""
    page.execute_script(
        "window.played.push([arguments[0], arguments[1]])", body, {"status": status, "headers": headers}
    )


def cells(page: Any, answer: int = -1) -> list[dict[str, Any]]:
    return page.execute_script(CELLS, answer)  # type: ignore[no-any-return]  # as the script makes it


def text(page: Any, selector: str, answer: int = -1) -> str:
    script = "return [...document.querySelectorAll('.answer')].at(arguments[0]).querySelector(arguments[1]).textContent"
    return str(page.execute_script(script, answer, selector))


def slide(page: Any, step: int, answer: int = -1) -> None:
    page.execute_script(
        "const s = [...document.querySelectorAll('.answer')].at(arguments[1]).querySelector('[type=range]');"
        "s.value = arguments[0]; s.dispatchEvent(new Event('input'))",
        step, answer,
    )  # fmt: skip


def shown(token: str) -> str:
    return "∎" if token == "<|endoftext|>" else token.replace("\n", "⏎")


def steps_of(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [chunk["dllm"] for chunk in chunks if "committed" in chunk.get("dllm", {})]


@contextmanager
def before_it_loads(page: Any, script: str) -> Iterator[None]:
    """Open the page again with a script that runs before its own."""
    added = page.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
    try:
        page.refresh()
        yield
    finally:
        page.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


class TestChat:
    def test_the_canvas_ends_with_the_text_of_the_api(self, page: Any, server: Running) -> None:
        ask(page)
        body = {"messages": [{"role": "user", "content": QUESTION}]}
        answer = server.post("chat/completions", body).json()
        ((path, said),) = sent(page)
        assert path == "v1/chat/completions"
        assert said["messages"] == body["messages"] and said["stream"] and said["dllm"]["events"] == "steps"
        assert text(page, ".text") == answer["choices"][0]["message"]["content"]
        canvas = cells(page)
        assert len(canvas) == 64
        written = "".join(c["text"] for c in canvas if "written" in c["kinds"] and "beyond" not in c["kinds"])
        assert written.removesuffix("∎").strip() == text(page, ".text").strip()
        assert any("filled" in c["kinds"] for c in canvas)
        figures = text(page, ".figures")
        assert figures.startswith(f"NFE {answer['dllm']['nfe'][0]} {answer['usage']['completion_tokens']} tokens ")
        for part in ("tokens per forward", "tokens/s", "first text after", "sampler tiny/threshold", "cache none"):
            assert part in figures

    @pytest.mark.parametrize(("sampler", "revises"), [("tiny/t2m", "revoked"), ("edit", "edited")])
    def test_every_step_shows_what_the_server_streams(
        self, page: Any, server: Running, sampler: str, revises: str
    ) -> None:
        """Committed, provisional, revoked and edited positions."""
        put(page, "sampler", sampler)
        ask(page)
        body = {"messages": [{"role": "user", "content": QUESTION}], "dllm": {"sampler": sampler, "events": "steps"}}
        told = steps_of(server.stream("chat/completions", **body))
        written: dict[int, str] = {}
        struck = {"revoked": 0, "edited": 0}
        for number, step in enumerate(told, start=1):
            before = dict(written)
            written = {place: token for place, token in written.items() if place not in step["revoked"]}
            written |= {place: token for place, token, *_ in step["committed"]}
            slide(page, number)
            canvas = cells(page)
            assert text(page, "output") == f"step {number} of {len(told)}, NFE {step['nfe']}"
            assert {place for place, cell in enumerate(canvas) if "written" in cell["kinds"]} == set(written)
            guesses = {place for place, cell in enumerate(canvas) if "predicted" in cell["kinds"]}
            assert guesses == {place for place, *_ in step["provisional"]} - set(written)
            assert {place for place, cell in enumerate(canvas) if "filled" in cell["kinds"]} >= set(step["filled"])
            for place, token in before.items():
                if token == written.get(place):
                    continue
                kind, mark = ("edited", "revised") if place in written else ("revoked", "revoked")
                assert mark in canvas[place]["kinds"]
                assert canvas[place]["struck"] == shown(token)
                assert f'was "{shown(token)}" until step {number}' in canvas[place]["label"]
                struck[kind] += 1
            for (place, _), share in zip(step["committed"], step["confidence"], strict=True):
                told_share = re.search(r"confidence ([\d.]+|unknown)", canvas[place]["label"])[1]
                assert told_share == "unknown" if share is None else abs(float(told_share) - 100 * share) < 0.06
            colours = {canvas[place]["colour"] for place, *_ in step["committed"]}
            assert len(colours) <= 1 and "" not in colours  # one colour for a step
        assert struck[revises]

    def test_it_fills_while_it_is_decoded(self, page: Any) -> None:
        page.execute_script("""
          window.seen = new Set();
          new MutationObserver(() => {
            const answer = document.querySelector('.answer');
            if (!answer?.hasAttribute('aria-busy')) return;
            for (const cell of answer.querySelectorAll('.token')) window.seen.add(cell.className.split(' ')[1]);
            window.told = answer.querySelector('.figures').textContent;
          }).observe(document.getElementById('chat-log'), { subtree: true, childList: true });
        """)
        put(page, "sampler", "vanilla")
        ask(page)
        assert set(page.execute_script("return [...window.seen]")) >= {"open", "predicted", "written"}
        assert re.fullmatch(r"NFE \d+ \d+ masked ", page.execute_script("return window.told"))

    def test_a_text_that_was_revised_is_replaced_at_the_end(self, page: Any) -> None:
        figures = {"nfe": [1], "tokens": 1, "tokens_per_forward": 1, "tokens_per_second": 1}
        step = {"nfe": 1, "masked": 0, "provisional": [], "committed": [[0, "5"]], "confidence": [None]}
        told: list[tuple[str, str | None, dict[str, Any]]] = [
            ("", None, {"begin": {"length": 1, "given": []}}),
            ("4", None, step | {"revoked": [], "filled": []}),
            ("", "stop", figures | {"sampler": "wino", "cache": "none", "text": "5"}),
        ]
        chunks = [
            {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": reason}], "dllm": also}
            for content, reason, also in told
        ]
        play(page, "".join(f"data: {json.dumps(chunk)}\r\n\r\n" for chunk in chunks) + "data: [DONE]\n\n")
        ask(page)
        assert text(page, ".text") == "5"
        assert cells(page)[0]["label"] == 'Position 1: "5", written in step 1, confidence unknown'

    def test_the_conversation_goes_on(self, page: Any) -> None:
        find(page, "#prompt").send_keys(QUESTION, ENTER)
        until(page, "!document.getElementById('send').disabled && window.sent.length === 1")
        first = text(page, ".text")
        find(page, "#prompt").send_keys("And", SHIFT, ENTER, SHIFT, "now?", ENTER)
        until(page, "!document.getElementById('send').disabled && window.sent.length === 2")
        roles = [(each["role"], each["content"]) for each in sent(page)[1][1]["messages"]]
        assert roles == [("user", QUESTION), ("assistant", first), ("user", "And\nnow?")]
        find(page, "#clear").click()
        assert page.find_elements("css selector", ".turn") == []
        ask(page)
        assert len(sent(page)[2][1]["messages"]) == 1

    def test_markup_stays_text(self, page: Any) -> None:
        ask(page, "<img src=x onerror=document.title='bad'>")
        assert find(page, ".asked").text == "<img src=x onerror=document.title='bad'>"
        assert page.find_elements("css selector", "img") == []


class TestSettings:
    def test_offers_the_samplers_of_the_server_and_their_options(self, page: Any, server: Running) -> None:
        samplers = server.service.describe()["samplers"]
        offered = page.execute_script(
            "return [...document.querySelector('[name=sampler]').options].map((o) => o.value)"
        )
        assert offered == ["", *(each["name"] for each in samplers)]
        for each in (samplers[0], next(s for s in samplers if any(isinstance(v, bool) for v in s["options"].values()))):
            put(page, "sampler", each["name"])
            names = page.execute_script("""
              return [...document.querySelector('.panel').querySelectorAll('.options input')]
                .map((i) => [i.name, i.type === 'checkbox' ? i.checked : Number(i.placeholder)])""")
            assert dict(names) == each["options"]

    def test_the_sampler_and_its_changed_options_are_sent(self, page: Any) -> None:
        put(page, "sampler", "localleap")
        put(page, "threshold", "0.5")
        ask(page)
        assert sent(page)[0][1]["dllm"] == {
            "events": "steps", "sampler": "localleap", "sampler_options": {"threshold": 0.5},
        }  # fmt: skip
        assert text(page, "h3") == "localleap threshold=0.5"
        put(page, "sampler", "klass")
        put(page, "ahead", False)
        ask(page)
        assert sent(page)[1][1]["dllm"]["sampler_options"] == {"ahead": False}
        find(page, ".reset").click()
        ask(page)
        assert sent(page)[2][1]["dllm"] == {"events": "steps"}

    def test_the_other_settings_are_sent(self, page: Any) -> None:
        given = {
            "max_tokens": 24, "block_length": 8, "temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": "\n\n.",
            "response_format": '{"type": "text"}',
        }  # fmt: skip
        for name, value in given.items():
            put(page, name, value)
        ask(page)
        body = sent(page)[0][1]
        assert {name: body[name] for name in ("max_tokens", "temperature", "top_p", "seed")} == {
            name: given[name] for name in ("max_tokens", "temperature", "top_p", "seed")
        }
        assert body["dllm"]["block_length"] == 8
        assert body["stop"] == ["."] and body["response_format"] == {"type": "text"}

    def test_a_format_that_is_no_json_is_not_sent(self, page: Any) -> None:
        put(page, "response_format", "{type: text}")
        ask(page)
        assert "Response format: this is not JSON" in find(page, "#complaint").text
        assert sent(page) == []

    def test_the_key_is_sent_and_stays_in_the_tab(self, page: Any) -> None:
        find(page, "#key").send_keys("secret", ENTER)
        ask(page)
        assert page.execute_script("return window.keys.at(-1)") == "Bearer secret"
        assert page.execute_script("return [sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        page.execute_script("sessionStorage.clear()")

    def test_a_server_with_a_key_asks_for_it_first(self, page: Any) -> None:
        guarded = """
          const real = window.fetch;
          window.fetch = (path, options) => options.headers.Authorization === 'Bearer secret' ? real(path, options)
            : Promise.resolve(new Response('{"error": {"message": "no key"}}', { status: 401 }));
        """
        with before_it_loads(page, guarded):
            until(page, "document.getElementById('trouble').textContent")
            assert find(page, "#trouble").text.startswith("The server asks for an API key")
            assert not find(page, "#send").is_enabled()
            find(page, "#key").send_keys("secret", TAB)
            until(page, "!document.getElementById('send').disabled")
            assert find(page, "#trouble").text == ""
        page.execute_script("sessionStorage.clear()")

    def test_a_model_without_a_chat_template_completes(self, page: Any, server: Running) -> None:
        bare = """
          const real = window.fetch;
          window.fetch = async (path, options) => {
            const answer = await real(path, options);
            if (path !== 'v1/models') return answer;
            const said = await answer.json();
            said.data[0].dllm.chat = false;
            return new Response(JSON.stringify(said));
          };
        """
        with before_it_loads(page, bare):
            until(page, "!document.getElementById('send').disabled")
            page.execute_script(RECORDER)
            assert find(page, "#chat-name").text == "Complete"
            for each in (QUESTION, f"{QUESTION} Tom"):
                ask(page, each)
            assert [(path, body["prompt"]) for path, body in sent(page)] == [
                ("v1/completions", QUESTION),
                ("v1/completions", f"{QUESTION} Tom"),
            ]
            answer = server.complete(prompt=f"{QUESTION} Tom")
            assert text(page, ".text") == answer["choices"][0]["text"]


class TestComparison:
    def test_two_settings_decode_the_same_prompt(self, page: Any) -> None:
        assert [each.is_displayed() for each in page.find_elements("css selector", ".panel")] == [True, False]
        find(page, "#compare").click()
        put(page, "sampler", "vanilla", panel=1)
        ask(page)
        one, other = (body for _, body in sent(page))
        assert one["messages"] == other["messages"]
        assert "sampler" not in one["dllm"] and other["dllm"]["sampler"] == "vanilla"
        assert len(page.find_elements("css selector", ".answer")) == 2
        assert "sampler tiny/threshold" in text(page, ".figures", 0) and "sampler vanilla" in text(page, ".figures", 1)
        assert int(text(page, ".figures span", 0)[4:]) < int(text(page, ".figures span", 1)[4:])
        texts = [text(page, ".text", each) for each in (0, 1)]
        slide(page, 2, answer=0)  # each has its own steps
        assert text(page, "output", 0).startswith("step 2 ") and not text(page, "output", 1).startswith("step 2 ")
        ask(page, "And now?")
        assert [body["messages"][1]["content"] for _, body in sent(page)[2:]] == texts


class TestInfilling:
    def test_fills_the_holes_of_a_text(self, page: Any, server: Running) -> None:
        find(page, "[value=infill]").click()
        assert not find(page, "[name=max_tokens]").is_displayed() and not find(page, "[name=stop]").is_displayed()
        field = find(page, "#text")
        field.send_keys(HOLED[:-1])
        page.execute_script("document.getElementById('count').value = 2")
        find(page, "#insert").click()
        assert page.switch_to.active_element == field
        field.send_keys(".")
        assert field.get_attribute("value") == HOLED[:-1] + "▢▢."
        assert find(page, "#holes").text == "6 masks in 2 holes"
        assert [each.text for each in page.find_elements("css selector", "#preview .hole")] == ["▢▢▢▢", "▢▢"]
        field.send_keys(CONTROL, ENTER)
        until(page, "window.sent.length === 1 && !document.getElementById('send').disabled")
        ((path, body),) = sent(page)
        prompt = HOLED.replace("____", MASK * 4)[:-1] + MASK * 2 + "."
        assert path == "v1/completions" and body["prompt"] == prompt and body["dllm"]["infill"]
        answer = server.complete(prompt=prompt, max_tokens=None, dllm={"infill": True})
        assert text(page, ".text") == answer["choices"][0]["text"]
        canvas = cells(page)
        assert sum("written" in c["kinds"] for c in canvas) == 6
        assert all("written" in c["kinds"] or "given" in c["kinds"] for c in canvas)
        slide(page, 1)
        assert [c["text"] for c in canvas if "given" in c["kinds"]] == [
            c["text"] for c in cells(page) if "given" in c["kinds"]
        ]

    def test_a_text_without_masks_is_not_sent(self, page: Any) -> None:
        find(page, "[value=infill]").click()
        ask(page, "def __init__(self)")
        assert find(page, "#complaint").text == "Put at least one mask into the text."
        assert sent(page) == []


class TestTrouble:
    def test_stop_ends_the_request_and_keeps_what_is_there(self, page: Any, server: Running) -> None:
        cancelled = 'dllm_requests_total{outcome="cancelled"}'
        before = server.metrics().get(cancelled, 0)
        page.execute_script("""
          new MutationObserver(() => {
            if (document.querySelector('.figures span')) document.getElementById('stop').click();
          }).observe(document.getElementById('chat-log'), { subtree: true, childList: true });
        """)
        put(page, "sampler", "vanilla")
        put(page, "max_tokens", 300)
        ask(page)
        assert text(page, ".figures").endswith("stopped ")
        assert find(page, "#status").text.endswith("stopped.")
        assert page.switch_to.active_element == find(page, "#prompt")
        assert any("open" in c["kinds"] or "predicted" in c["kinds"] for c in cells(page))
        assert text(page, "output").startswith("step ")
        assert server.metrics()[cancelled] == before + 1

    def test_the_words_of_the_server_are_shown(self, page: Any) -> None:
        put(page, "temperature", -1)
        ask(page)
        assert "temperature=-1" in find(page, ".problem").text
        assert find(page, "#status").text.endswith("failed.")
        put(page, "temperature", "")
        ask(page)  # what failed is no part of the conversation
        assert len(sent(page)[1][1]["messages"]) == 1

    def test_a_full_queue_says_when_to_try_again(self, page: Any) -> None:
        play(page, json.dumps({"error": {"message": "the queue is full"}}), 429, **{"Retry-After": "3"})
        ask(page)
        assert find(page, ".problem").text == "The server is busy: the queue is full. Try again in 3 s."

    @pytest.mark.parametrize(
        ("body", "status", "words"),
        [
            (json.dumps({"error": {"message": "no key"}}), 401, "The server asks for an API key"),
            (json.dumps({"error": {"message": "stopping"}}), 503, "The server does not answer now: stopping."),
            ("<html>", 502, "status 502."),
            ('data: {"error": {"message": "out of memory"}}\n\n', 200, "out of memory."),
            ("data: {}\n\n", 200, "The server ended the answer early."),
        ],
    )
    def test_every_failure_is_told(self, page: Any, body: str, status: int, words: str) -> None:
        play(page, body, status)
        ask(page)
        assert find(page, ".problem").text.startswith(words)
        assert find(page, ".problem").get_attribute("role") == "alert"

    def test_a_server_that_is_gone(self, page: Any) -> None:
        page.execute_script("window.fetch = () => Promise.reject(new TypeError('no'))")
        ask(page)
        assert find(page, ".problem").text == "The server cannot be reached; is it still running?"


class TestSteps:
    def test_go_back_and_forth(self, page: Any) -> None:
        put(page, "sampler", "vanilla")
        put(page, "max_tokens", 16)
        ask(page)
        last = text(page, "output").split()[3].rstrip(",")
        assert text(page, "output").startswith(f"step {last} of {last}")
        for name, step in (("first", "1"), ("next", "2"), ("back", "1"), ("last", last)):
            find(page, f".answer [data-go={name}]").click()
            assert text(page, "output").startswith(f"step {step} of {last}")
        slider = find(page, ".answer [type=range]")
        slider.send_keys(HOME, RIGHT)
        assert text(page, "output").startswith("step 2 ")
        assert slider.get_attribute("aria-valuetext") == text(page, "output")
        slide(page, int(last) - 1)
        toggle = find(page, ".answer .play")
        toggle.click()
        assert toggle.get_attribute("aria-label") == "Pause"
        until(page, "document.querySelector('.answer .play').ariaLabel === 'Play'")
        assert text(page, "output").startswith(f"step {last} of")

    def test_colours_tell_the_confidence_instead(self, page: Any) -> None:
        ask(page)
        before = [c["colour"] for c in cells(page)]
        find(page, "[name=colour][value=confidence]").click()
        assert [c["colour"] for c in cells(page)] != before
        assert find(page, "#ramp").text.startswith("unsure")


class TestAccess:
    def test_tokens_are_reached_and_read_by_keyboard(self, page: Any) -> None:
        ask(page)
        canvas = find(page, ".answer .canvas")
        assert canvas.get_attribute("role") == "group" and "arrow keys" in canvas.get_attribute("aria-label")
        assert len(canvas.find_elements("css selector", "[tabindex='0']")) == 1
        page.execute_script("document.querySelector('.answer .token').focus()")
        for key in (RIGHT, RIGHT, LEFT):
            page.switch_to.active_element.send_keys(key)
        focused = page.switch_to.active_element
        assert focused.get_attribute("tabindex") == "0"
        assert len(canvas.find_elements("css selector", "[tabindex='0']")) == 1
        token = re.escape(cells(page)[1]["text"])
        label = focused.get_attribute("aria-label")
        assert re.fullmatch(rf'Position 2: "{token}", written in step \d+, confidence .+', label)
        assert text(page, ".details") == label
        focused.send_keys(HOME)  # leads to the first step, and reads what the token was there
        assert text(page, "output").startswith("step 1 ")
        assert text(page, ".details") == page.switch_to.active_element.get_attribute("aria-label")

    def test_says_once_that_an_answer_is_there(self, page: Any) -> None:
        page.execute_script("""
          window.said = [];
          new MutationObserver(() => window.said.push(document.getElementById('status').textContent))
            .observe(document.getElementById('status'), { childList: true });
        """)
        ask(page)
        assert page.switch_to.active_element == find(page, "#send")  # which was disabled meanwhile
        said = page.execute_script("return window.said")
        assert len(said) == 2
        answer = re.escape(text(page, ".text"))
        assert answer and re.fullmatch(rf"tiny/threshold: \d+ tokens in \d+ forwards\. {answer} ", said[1])
        live = "return [...document.querySelectorAll('.answer output, .answer [aria-live]')].map((e) => e.ariaLive)"
        assert page.execute_script(live) == ["off"]
        find(page, ".answer [data-go=back]").click()  # what a button does has to be said, the slider says it itself
        assert page.execute_script(live) == ["polite"]
        slide(page, 2)
        assert page.execute_script(live) == ["off"]

    def test_names_its_parts_to_those_who_cannot_see_them(self, page: Any) -> None:
        find(page, "#compare").click()
        ask(page)
        assert page.execute_script(UNNAMED) == []
        names = page.execute_script("return [...document.querySelectorAll('[id]')].map((e) => e.id)")
        assert len(names) == len(set(names))

    @pytest.mark.parametrize("infill", [False, True])
    def test_every_part_has_a_role_and_a_name(self, page: Any, infill: bool) -> None:
        find(page, "#compare").click()
        put(page, "sampler", "wino", panel=1)
        if infill:
            find(page, "[value=infill]").click()
        ask(page, HOLED if infill else QUESTION)
        parts = spoken(page)
        assert [each for each in parts if each[2].get("focusable") and (not each[1] or each[0] == "generic")] == []
        assert [role for role, name, _ in parts if role in ("group", "region", "form", "heading") and not name] == []
        named = [(role, name) for role, name, _ in parts]
        for part in [
            ("group", "Settings A"), ("group", "Settings B"), ("group", "Options of the sampler"), ("button", "Play"),
            ("region", "B: wino"), ("group", "Canvas of B: wino; arrow keys go from token to token"),
            ("slider", "Step"), ("form", "What to send"), ("group", "Colour"),
            ("group", "Infilled texts" if infill else "Conversation"),
        ]:  # fmt: skip
            assert part in named, part
        levels = [each[2]["level"] for each in parts if each[0] == "heading"]
        assert all(after - before <= 1 for before, after in itertools.pairwise([0, *levels]))

    def test_tab_goes_through_the_page_from_top_to_bottom(self, page: Any) -> None:
        ask(page)
        page.execute_script("document.querySelector('.skip').focus()")
        seen = []
        while page.switch_to.active_element.tag_name != "body":
            seen.append(page.switch_to.active_element)
            assert len(seen) < 60
            seen[-1].send_keys(TAB)
        order = "return arguments[0].compareDocumentPosition(arguments[1]) & Node.DOCUMENT_POSITION_FOLLOWING"
        assert all(page.execute_script(order, *each) for each in itertools.pairwise(seen))
        assert {
            find(page, each) for each in ("#key", ".answer .token", ".answer [type=range]", "#prompt", "#send")
        } <= {*seen}

    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_all_text_has_enough_contrast(self, page: Any, theme: str) -> None:
        with themed(page, theme):
            find(page, "#compare").click()
            put(page, "sampler", "vanilla")
            put(page, "sampler", "wino", panel=1)
            ask(page)
            kinds = {kind for cell in cells(page) for kind in cell["kinds"]}
            assert {"written", "beyond"} <= kinds
            assert page.execute_script(FAINT) == []
            for answer in (0, 1):
                slide(page, 4, answer)
            find(page, "[name=colour][value=confidence]").click()
            assert page.execute_script(FAINT) == []
            put(page, "temperature", -1)
            find(page, "[value=infill]").click()
            ask(page, HOLED)
            assert text(page, ".problem", 2)
            assert page.execute_script(FAINT) == []

    def test_fits_a_phone(self, page: Any) -> None:
        find(page, "#compare").click()
        ask(page)
        assert width_on_a_phone(page) <= 360
        find(page, "[value=infill]").click()
        assert width_on_a_phone(page) <= 360


def test_asks_its_own_server_alone_and_complains_of_nothing(page: Any, server: Running) -> None:
    asked(page), page.get_log("browser")  # read, and so forgotten: what came before
    page.refresh()
    until(page, "!document.getElementById('send').disabled")
    ask(page)
    addresses = asked(page)
    assert all(each.startswith(server.url) for each in addresses)
    assert {each.removeprefix(server.url) for each in addresses} >= {"/", "/page/main.js", "/v1/models"}
    assert [each for each in page.get_log("browser") if each["level"] not in ("DEBUG", "INFO")] == []


def test_nothing_but_its_own_files_may_run(server: Running) -> None:
    for path, (content, kind) in files().items():
        answer = httpx.get(server.url + path)
        assert (answer.content, answer.headers["content-type"]) == (content, kind)
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'" and {policy["script-src"], policy["style-src"]} == {"'self'"}
    document = files()["/"][0].decode()
    assert set(re.findall(r'(?:src|href)="(page/[^"]+)"', document)) <= {path[1:] for path in files()}
    assert not re.search(r"<script(?![^>]* src=)|<style| style=| on\w+=", document)
    assert not any(b"innerHTML" in content for content, _ in files().values())
