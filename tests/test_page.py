"""The page of a report in a browser: the player shows the trace, tables sort, nothing leaves the page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser_rig import UNNAMED, asked, in_a_browser, opened, webdriver, width_on_a_phone
from commands import command
from dllm.decoding.colours import RAMPS, shade
from dllm.evaluation.trace import Trace
from dllm.reports.player import moment, word
from report_rig import SETTINGS, trace, write_sweep

pytestmark = in_a_browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with opened(tmp_path_factory.mktemp("browser")) as driver:
        yield driver


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_sweep(tmp_path_factory.mktemp("sweep"))
    assert command("report", str(folder)).code == 0
    return folder / "report.html"


@pytest.fixture
def page(browser: Any, report: Path) -> Any:
    browser.get(report.as_uri())
    choose(browser, "run", "freedave 4 + none")
    return browser


def choose(page: Any, name: str, label: str) -> None:
    from selenium.webdriver.support.select import Select

    Select(page.find_element("id", name)).select_by_visible_text(label)


def slide(page: Any, step: int) -> None:
    """Set the slider, as a pointer does."""
    page.execute_script(
        "const s = document.getElementById('step'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))", step
    )


def told(page: Any) -> str:
    return str(page.find_element("id", "status").text)


def press(page: Any, name: str, *keys: str) -> None:
    page.find_element("id", name).send_keys(*keys)


def cells(page: Any) -> list[dict[str, Any]]:
    """Each position of the canvas: its text, its classes, its colour, and the draft struck through behind it."""
    return page.execute_script("""  // what a reader sees, position by position
      return [...document.querySelectorAll('#canvas .token')].map((e) => ({
        text: e.firstChild.textContent, kind: e.className.split(' ').slice(1), colour: e.style.backgroundColor,
        struck: e.querySelector('s')?.textContent ?? null }))
    """)  # type: ignore[no-any-return]  # as the script makes it


def expected(shown: Trace, sample: int, step: int, colour: str) -> list[dict[str, Any]]:
    """The same of a trace."""
    frames = shown.frames[sample]
    now, found = moment(frames, step, shown.mask_token_id), []
    for place, token in enumerate(now.tokens.tolist()):
        guess, mark, struck = int(now.predicted[place]), "", None
        kind = "written" if not now.open[place] else "open" if guess == shown.mask_token_id else "predicted"
        text = {"written": word(shown, token), "predicted": word(shown, guess), "open": "·"}[kind]
        if kind == "written":
            share = now.commit_step[place] / (len(frames.canvas) - 1)
            red, green, blue = shade(colour, share if colour == "commit_step" else float(now.confidence[place]))
            mark = f"rgb({red}, {green}, {blue})"
        kinds = [kind] + ["accepted"] * bool(now.accepted[place]) + ["rejected"] * bool(now.rejected[place])
        if now.rejected[place]:
            struck = word(shown, int(now.drafted[place]))
        found.append({"text": text.replace("⏎", "⏎\n"), "kind": kinds, "colour": mark, "struck": struck})
    return found


class TestPlayer:
    @pytest.mark.parametrize("colour", RAMPS)
    @pytest.mark.parametrize("sample", [0, 1])
    def test_shows_the_trace_at_every_step(self, page: Any, sample: int, colour: str) -> None:
        shown = trace(drafts=True)
        choose(page, "sample", shown.frames[sample].id)
        page.find_element("css selector", f"[name=colour][value={colour}]").click()
        for step in range(len(shown.frames[sample].canvas)):
            slide(page, step + 1)
            assert cells(page) == expected(shown, sample, step, colour)
            assert told(page) == f"step {step + 1} of {len(shown.frames[sample].canvas)}, NFE {step + 1}"

    def test_the_strip_tells_what_was_computed(self, page: Any) -> None:
        frames = trace().frames[0]
        for step, computed in enumerate(frames.computed):
            slide(page, step + 1)
            columns = [
                element.get_attribute("class").split() for element in page.find_elements("css selector", "#strip i")
            ]
            assert ["computed" in classes for classes in columns] == computed.tolist()
            assert ["prompt" in classes for classes in columns] == [
                i < len(frames.prompt) for i in range(len(computed))
            ]
            counted = page.find_element("id", "counted").text
            assert counted.startswith(f"{computed.sum()} of {len(computed)} columns computed")

    def test_the_prompt_stands_above(self, page: Any) -> None:
        shown = trace()
        words = "".join(word(shown, token) for token in shown.frames[0].prompt.tolist())
        assert page.find_element("id", "prompt").text == words

    def test_the_slider_moves_by_keyboard(self, page: Any) -> None:
        press(page, "step", "\ue014", "\ue014")  # right
        assert told(page).startswith("step 3 of 14")
        press(page, "step", "\ue012")  # left
        assert told(page).startswith("step 2 of 14")
        press(page, "step", "\ue010")  # end
        assert told(page).startswith("step 14 of 14")

    def test_buttons_step_and_stop_at_the_ends(self, page: Any) -> None:
        for names, step in ((["next", "next"], 3), (["back"], 2), (["first", "back"], 1), (["last", "next"], 14)):
            for name in names:
                page.find_element("css selector", f"[data-go={name}]").click()
            assert told(page).startswith(f"step {step} of 14")
            assert page.find_element("id", "step").get_attribute("value") == str(step)

    def test_arrow_keys_step_wherever_the_focus_is(self, page: Any) -> None:
        press(page, "play", "\ue014", "\ue014", "\ue012")
        assert told(page).startswith("step 2 of 14")

    def test_plays_to_the_end_and_again_from_the_start(self, page: Any) -> None:
        from selenium.webdriver.support.wait import WebDriverWait

        slide(page, 13)
        play = page.find_element("id", "play")
        play.click()
        assert play.get_attribute("aria-label") == "Pause"
        WebDriverWait(page, 20).until(lambda page: play.get_attribute("aria-label") == "Play")
        assert told(page).startswith("step 14 of 14")
        play.click()
        assert told(page).startswith("step 1 of 14")
        play.click()
        assert play.get_attribute("aria-label") == "Play"

    def test_tells_about_a_token_that_is_pointed_at(self, page: Any) -> None:
        shown = trace()
        slide(page, 14)
        tokens = page.find_elements("css selector", "#canvas .token")
        webdriver.ActionChains(page).move_to_element(tokens[4]).perform()
        now = moment(shown.frames[0], 13, shown.mask_token_id)
        details = page.find_element("id", "details").text
        token, since = int(now.tokens[4]), now.commit_step[4] + 1
        assert details.startswith(f'Position 5: "{word(shown, token)}" (token {token}), written in step {since}, ')
        assert details.endswith(f"confidence {now.confidence[4]:.1%}")

    def test_tokens_can_be_read_about_by_keyboard(self, page: Any) -> None:
        page.execute_script("document.querySelector('#canvas .token').focus()")
        focused = page.switch_to.active_element
        focused.send_keys("\ue014")
        page.switch_to.active_element.send_keys("\ue014")
        assert page.find_element("id", "details").text.startswith("Position 3: ")
        assert told(page).startswith("step 1 of 14")

    def test_another_run_shows_the_same_sample(self, page: Any) -> None:
        choose(page, "sample", "problem 1")
        choose(page, "run", "threshold 0.999")
        assert page.find_element("id", "sample").get_attribute("value") == "1"
        assert told(page).startswith("step 1 of 12")

    def test_a_run_without_a_trace_says_so(self, page: Any) -> None:
        choose(page, "run", "vanilla (no trace here)")
        assert page.find_element("id", "note").text == "This run left no trace."
        assert not page.find_element("id", "stage").is_displayed()
        choose(page, "run", "threshold 0.999")
        assert page.find_element("id", "stage").is_displayed()
        assert not page.find_element("id", "note").is_displayed()

    def test_a_setting_of_the_table_leads_to_its_trace(self, page: Any) -> None:
        page.find_element("link text", "localleap 0.999/0.99/4 + freecache").click()
        run = page.find_element("id", "run")
        assert run.find_element("css selector", "option:checked").text == "localleap 0.999/0.99/4 + freecache"


class TestTable:
    def column(self, page: Any, head: str) -> tuple[Any, list[str]]:
        """The header, and the texts below it."""
        table = page.find_element("css selector", "table.sortable")
        heads = table.find_elements("css selector", "thead th")
        place = [each.text.strip() for each in heads].index(head)
        rows = table.find_elements("css selector", "tbody tr")
        return heads[place], [row.find_elements("css selector", "th, td")[place].text for row in rows]

    def test_sorts_by_number_and_back(self, page: Any) -> None:
        numbers = sorted(nfe for _, nfe in SETTINGS.values())
        header, _ = self.column(page, "NFE")
        for direction, order in (("descending", numbers[::-1]), ("ascending", numbers)):
            header.find_element("css selector", "button").click()
            assert header.get_attribute("aria-sort") == direction
            assert [float(text.split()[0]) for text in self.column(page, "NFE")[1]] == order

    def test_sorts_by_name_with_the_keyboard(self, page: Any) -> None:
        header, _ = self.column(page, "setting")
        header.find_element("css selector", "button").send_keys("\n")
        names = [text.removesuffix(" (reference)") for text in self.column(page, "setting")[1]]
        assert header.get_attribute("aria-sort") == "ascending"
        assert names[0].startswith("ar_guided") and names[-1] == "vanilla 4"
        assert set(names) == set(SETTINGS)

    def test_what_was_not_measured_comes_last_either_way(self, page: Any) -> None:
        header, _ = self.column(page, "KV error")
        for _ in range(2):
            page.execute_script("arguments[0].querySelector('button').click()", header)
            texts = self.column(page, "KV error")[1]
            assert all(texts[:3]) and not any(texts[3:])


def test_fits_a_phone(page: Any) -> None:
    assert width_on_a_phone(page) <= 360


def test_names_its_parts_to_those_who_cannot_see_them(page: Any) -> None:
    assert page.execute_script(UNNAMED) == []


def test_asks_for_nothing_and_complains_of_nothing(page: Any) -> None:
    asked(page), page.get_log("browser")  # read, and so forgotten: what came before
    page.refresh()
    slide(page, 5)
    schemes = {url.split(":")[0] for url in asked(page)}
    assert "file" in schemes <= {"file", "data"}
    assert page.get_log("browser") == []
