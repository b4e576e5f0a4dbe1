"""The live page in a real Chromium: what it shows, what it asks, at desktop and phone width."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Literal

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from cluster.api.guard import Access
from cluster.core.types import GpuState
from cluster.status import ChainView
from tests.integration.page_world import (
    NOW,
    PATIENCE_SECONDS,
    PICTURES,
    TASK,
    SaidSource,
    browsing,
    busy_status,
    keep_picture,
    serving,
    wired,
)

TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as found:
        yield found


class Complaints(list[str]):
    """What the browser has to complain of: errors, refused content."""

    def watch(self, page: Page) -> Page:
        page.on("pageerror", lambda error: self.append(str(error)))
        page.on(
            "console",
            lambda message: self.append(message.text) if message.type == "error" else None,
        )
        return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)], ids=["desktop", "phone"])
def test_everything_is_there_and_fits(
    browser: Browser, width: int, height: int, scheme: Literal["light", "dark"]
) -> None:
    complaints = Complaints()
    with serving(SaidSource()) as url:
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        page = complaints.watch(context.new_page())
        page.goto(url)
        expect(page.locator("#state")).to_have_text("✓ serving")
        expect(page.locator("#gpus article")).to_have_count(7)
        expect(page.locator("#accounts tbody tr")).to_have_count(5)
        expect(page.locator("#tasks tbody tr")).to_have_count(10)
        expect(page.locator("#plot rect.bar")).to_have_count(24)
        expect(page.locator("#alert-list li")).to_have_text(
            ["GPU node-2: the canary's answer was another one"]
        )
        # Each state is told by a sign and a word.
        for words in (
            "▶ busy",
            "✓ ready",
            "✕ quarantined",
            "! starting",
            "! drained",
            "✕ unreachable",
        ):
            expect(page.locator("#gpus")).to_contain_text(words)
        # What is broken stands first.
        for place, state in enumerate(("quarantined", "unreachable", "busy")):
            expect(page.locator("#gpus article").nth(place)).to_contain_text(state)
        for words in ("NVIDIA GeForce RTX 4090", "11 of 25", "62 °C", "power cap", "30 min ago"):
            expect(page.locator("#gpus")).to_contain_text(words)
        expect(page.locator("#glance")).to_contain_text("1,234 CNX")
        expect(page.locator("#endpoints")).to_contain_text("✕ timed out")
        expect(page.locator("#stores")).to_contain_text("base:acme/large 50 %")
        expect(page.locator("#stores")).to_contain_text("6.0 s left")
        # Nothing makes the page itself wider than the screen, and what comes from tasks is text.
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.locator("img").count() == 0
        assert page.title() == "crynux-cluster"
        keep_picture(page, f"page-{width}-{scheme}")
        context.close()
    assert complaints == []


def test_it_follows_what_happens(browser: Browser) -> None:
    source = SaidSource()
    with serving(source) as url:
        page = browser.new_page()
        page.goto(url)
        expect(page.locator("#gpus article")).to_have_count(7)
        source.now = busy_status().model_copy(update={"gpus": busy_status().gpus[:2]})
        expect(page.locator("#gpus article")).to_have_count(2)
        source.away = "it is being replaced"
        expect(page.locator("#state")).to_contain_text("it is being replaced")
        source.away = None
        expect(page.locator("#state")).to_have_text("✓ serving")
        source.now = busy_status().model_copy(update={"acting": False})
        expect(page.locator("#state")).to_have_text(
            "✕ not serving: the coordinator is not acting: it doesn't hold the lease"
        )
        away = ChainView(reached=False, chain_id=1, error="timed out")
        problems = ("timed out", "GPU node-2: it is hot")
        source.now = busy_status().model_copy(update={"chain": away, "problems": problems})
        # What the headline says is said once.
        expect(page.locator("#state")).to_have_text(
            "✕ not serving: the chain is not reached: timed out"
        )
        expect(page.locator("#alert-list li")).to_have_text(["GPU node-2: it is hot"])
        page.close()


def test_a_server_that_goes_silent_without_closing_serves_no_more_and_is_asked_again(
    browser: Browser,
) -> None:
    source = SaidSource()
    with wired(source) as wire:
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda each: asked.append(each.url))
        page.goto(wire.url)
        expect(page.locator("#state")).to_have_text("✓ serving")
        assert sum(url.endswith("/v1/events") for url in asked) == 1
        wire.fall_silent()
        expect(page.locator("#state")).to_contain_text("No news since")
        # It isn't asked each second.
        page.wait_for_timeout(5_000)
        assert sum(url.endswith("/v1/events") for url in asked) == 2
        source.now = busy_status().model_copy(update={"gpus": busy_status().gpus[:2]})
        wire.speak()
        expect(page.locator("#state")).to_have_text("✓ serving")
        expect(page.locator("#gpus article")).to_have_count(2)
        page.close()


def test_an_open_page_is_loaded_anew_when_another_version_answers_and_not_again_and_again(
    browser: Browser,
) -> None:
    source = SaidSource()
    with serving(source, Access(TOKEN)) as url:
        page = browser.new_page()
        loads: list[Page] = []
        page.on("load", lambda each: loads.append(each))  # noqa: PLW0108 - no method of C can listen
        page.goto(url)
        page.locator("#secret").fill(TOKEN)
        page.get_by_role("button", name="Use it").click()
        expect(page.locator("#state")).to_have_text("✓ serving")
        page.locator("#tasks tbody tr").first.get_by_role("button").click()
        expect(page.locator("#story")).to_contain_text(TASK)
        page.evaluate("window.old = true")
        with page.expect_event("load", timeout=PATIENCE_SECONDS * 1000):
            source.now = source.now.model_copy(update={"version": "1.2.4"})
        expect(page.locator("#version")).to_have_text("1.2.4")
        expect(page.locator("#state")).to_have_text("✓ serving")
        assert page.evaluate("window.old") is None
        assert len(loads) == 2
        # The token and what was open are still there.
        assert page.url.endswith(f"#task={TASK}")
        expect(page.locator("#story")).to_contain_text(TASK)
        expect(page.locator("#token")).not_to_be_visible()
        for version in ("1.2.3", "1.2.4"):
            source.now = source.now.model_copy(update={"version": version})
            expect(page.locator("#version")).to_have_text(version)
        assert len(loads) == 2
        page.close()


def test_what_cant_be_drawn_is_no_lost_connection_and_leaves_the_rest(browser: Browser) -> None:
    source = SaidSource()
    with serving(source) as url:
        page = browser.new_page()
        asked: list[str] = []
        page.on("request", lambda each: asked.append(each.url))
        # Only cards are sorted by it.
        page.add_init_script("String.prototype.localeCompare = () => { throw Error('a bug'); }")
        page.goto(url)
        expect(page.locator("#state")).to_have_text("✓ serving – this page can't show GPUs: a bug")
        expect(page.locator("#tasks tbody tr")).to_have_count(10)
        expect(page.locator("#accounts tbody tr")).to_have_count(5)
        for problem in ("one", "two", "three"):
            source.now = source.now.model_copy(update={"problems": (problem,)})
            expect(page.locator("#alert-list li")).to_have_text([problem])
        assert sum(each.endswith("/v1/events") for each in asked) == 1
        page.close()


MARK = "id => getSelection().selectAllChildren(document.querySelector(id))"
"""As a person does who wants to copy it."""


def test_only_the_section_in_which_text_is_marked_is_held_and_not_for_ever(
    browser: Browser,
) -> None:
    source = SaidSource()
    with serving(source) as url:
        page = browser.new_page()
        page.clock.install()
        page.goto(url)
        expect(page.locator("#gpus article")).to_have_count(7)
        page.evaluate(MARK, "#gpus h3")
        now = busy_status()
        source.now = now.model_copy(
            update={
                "gpus": now.gpus[:2],
                "tasks": now.tasks[:3],
                "problems": ("GPU node-2: it is hot",),
                "totals": now.totals.model_copy(update={"slashed": 1}),
            }
        )
        expect(page.locator("#alert-list li")).to_have_text(["GPU node-2: it is hot"])
        expect(page.locator("#glance")).to_contain_text("✕ 1")
        expect(page.locator("#glance")).to_contain_text("of 2")
        expect(page.locator("#tasks tbody tr")).to_have_count(3)
        expect(page.locator("#fresh")).to_contain_text("held while text is marked: GPUs")
        assert page.locator("#gpus article").count() == 7
        # The headline goes on too.
        source.now = source.now.model_copy(update={"acting": False})
        expect(page.locator("#state")).to_contain_text("not serving")
        assert page.locator("#gpus article").count() == 7
        page.clock.fast_forward(31_000)
        expect(page.locator("#gpus article")).to_have_count(2)
        expect(page.locator("#fresh")).not_to_contain_text("held")
        page.evaluate(MARK, "#tasks tbody tr")
        source.now = source.now.model_copy(update={"tasks": now.tasks[:4]})
        expect(page.locator("#fresh")).to_contain_text("held while text is marked: Tasks")
        page.evaluate("getSelection().empty()")
        expect(page.locator("#tasks tbody tr")).to_have_count(4)
        page.close()


def test_two_hundred_cards_are_seen_at_a_glance(browser: Browser) -> None:
    cards = tuple(
        busy_status().gpus[0].model_copy(update={"gpu_id": f"node-{n}", "problem": "x" * (n == 7)})
        for n in range(199)
    )
    silent = cards[0].model_copy(update={"gpu_id": "node-silent", "state": GpuState.UNREACHABLE})
    silent_too = silent.model_copy(update={"busy_seconds": 1.0})
    cards = (*cards, silent)
    source = SaidSource(busy_status().model_copy(update={"gpus": cards}))
    with serving(source) as url:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(url)
        expect(page.locator("#gpus article")).to_have_count(200)
        expect(page.locator("#gpus details[open]")).to_have_count(2)
        expect(page.locator("#gpus article").first).to_contain_text("node-7")
        expect(page.locator("#gpus article").nth(1)).to_contain_text("node-silent")
        # What a person opens stays open, and keeps the focus, while the page goes on.
        second = page.locator("#gpus summary").nth(2)
        second.click()
        marked = page.evaluate("document.querySelector('#gpus').firstChild.dataset.old = '1'")
        assert marked == "1"
        # What hasn't changed isn't shown anew; what has changed is.
        source.now = source.now.model_copy(update={"problems": ("something else",)})
        expect(page.locator("#alert-list")).to_contain_text("something else")
        expect(page.locator("#gpus article").first).to_have_attribute("data-old", "1")
        source.now = source.now.model_copy(update={"gpus": (*cards[:-1], silent_too)})
        expect(page.locator("#gpus article").first).not_to_have_attribute("data-old", "1")
        expect(page.locator("#gpus details[open]")).to_have_count(3)
        expect(second).to_be_focused()
        keep_picture(page, "many")
        page.close()


def test_an_account_that_no_card_needs_is_spare_and_nothing_to_see_to(browser: Browser) -> None:
    first, *_ = busy_status().accounts
    spare = first.model_copy(
        update={"index": 2, "status": "quit", "gpu_class": None, "current_task": None}
    )
    status = busy_status().model_copy(update={"accounts": (first, spare)})
    with serving(SaidSource(status)) as url:
        page = browser.new_page()
        page.goto(url)
        rows = page.locator("#accounts tbody tr")
        expect(rows.nth(1)).to_contain_text("spare")
        expect(rows.nth(1).locator(".state")).to_have_count(0)
        expect(page.locator("#glance")).to_contain_text("1 of 1")


def test_of_many_accounts_those_that_dont_serve_are_seen(browser: Browser) -> None:
    first = busy_status().accounts[1]
    accounts = tuple(
        first.model_copy(
            update={"index": n, "address": f"0x{n:040x}", "status": "paused" if n == 77 else "busy"}
        )
        for n in range(1, 501)
    )
    with serving(SaidSource(busy_status().model_copy(update={"accounts": accounts}))) as url:
        page = browser.new_page()
        page.goto(url)
        rows = page.locator("#accounts tbody tr")
        expect(rows).to_have_count(1)
        expect(rows).to_contain_text("! paused")
        expect(page.locator("#glance")).to_contain_text("499 of 500")
        page.get_by_label("Show all 500").check()
        expect(rows).to_have_count(500)
        page.close()


def test_a_day_of_earnings_has_its_own_name_wherever_one_looks(browser: Browser) -> None:
    with serving(SaidSource()) as url:
        context = browser.new_context(timezone_id="America/Los_Angeles", locale="en-US")
        page = context.new_page()
        page.goto(url)
        page.get_by_role("button", name="month").click()
        today = f"{datetime.fromtimestamp(NOW, UTC):%b} {datetime.fromtimestamp(NOW, UTC).day}: "
        expect(page.locator("#plot rect.bar")).to_have_count(30)
        title = page.locator("#plot g title").last
        assert (title.text_content() or "").startswith(today)
        context.close()


def test_an_older_answer_doesnt_take_the_place_of_the_newest_range(browser: Browser) -> None:
    late: list[Route] = []
    with serving(SaidSource()) as url:
        page = browser.new_page()
        page.route("**/v1/earnings?days=7&*", lambda route: late.append(route))  # noqa: PLW0108
        page.goto(url)
        expect(page.locator("#plot rect.bar")).to_have_count(24)
        with page.expect_request("**/v1/earnings?days=7&*"):
            page.get_by_role("button", name="week").click()
        page.get_by_role("button", name="month").click()
        expect(page.locator("#plot rect.bar")).to_have_count(30)
        with page.expect_response("**/v1/earnings?days=7&*", timeout=PATIENCE_SECONDS * 1000):
            late[0].continue_()
        page.wait_for_timeout(1_000)
        assert page.locator("#plot rect.bar").count() == 30
        page.close()


def test_a_result_that_couldnt_be_shown_can_be_asked_for_again(browser: Browser) -> None:
    with serving(SaidSource()) as url:
        page = browser.new_page()
        page.route("**/files/*", lambda route: route.abort())
        page.goto(url)
        page.locator("#tasks tbody tr").first.get_by_role("button").click()
        story = page.locator("#story")
        story.get_by_role("button", name="Show the result").click()
        expect(story.get_by_role("alert")).to_have_count(PICTURES)
        page.unroute("**/files/*")
        story.get_by_role("button", name="Show the result").click()
        expect(story.locator("img")).to_have_count(PICTURES)
        expect(story.get_by_role("alert")).to_have_count(0)
        expect(story.get_by_role("button", name="Show the result")).to_be_disabled()
        page.close()


def test_a_task_is_told_whole(browser: Browser) -> None:
    complaints = Complaints()
    with serving(SaidSource()) as url:
        page = complaints.watch(browser.new_page())
        page.goto(url)
        page.locator("#tasks tbody tr").first.get_by_role("button").click()
        story = page.locator("#story")
        expect(story).to_be_visible()
        for words in (TASK, "out of memory", "the network gave it to us", "11.0 s", "--bundle"):
            expect(story).to_contain_text(words)
        # A link leads to the explorer, and to nowhere that isn't the web.
        assert [link.get_attribute("href") for link in story.get_by_role("link").all()] == [
            "https://explorer.example/tx/0x" + "ef" * 32
        ]
        assert story.locator("img").count() == 0
        story.get_by_role("button", name="Show the result").click()
        for n in range(PICTURES):
            expect(story.get_by_alt_text(f"Result {n}.png")).to_be_visible()
        widths = story.locator("img").evaluate_all("all => all.map(each => each.naturalWidth)")
        assert widths == [64] * PICTURES
        keep_picture(page, "story")
        page.keyboard.press("Escape")
        expect(story).not_to_be_visible()
        page.locator("#tasks-find").fill("12345678")
        page.locator("#tasks-open").click()
        expect(story).to_contain_text("no task is known by it")
        page.close()
        linked = complaints.watch(browser.new_page())
        linked.goto(f"{url}#task=abababab")
        expect(linked.locator("#story")).to_contain_text(TASK)
        linked.close()
    # The one answer that isn't well is the unknown task's.
    assert [each for each in complaints if "404" not in each] == []


def test_actions_are_asked_for_and_written_down(browser: Browser) -> None:
    source = SaidSource()
    with serving(source) as url:
        page = browser.new_page()
        page.goto(url)
        drain = page.get_by_role("button", name="Drain everything")
        page.once("dialog", lambda dialog: dialog.dismiss())
        drain.click()
        assert source.orders == []
        page.once("dialog", lambda dialog: dialog.accept())
        drain.click()
        expect(page.locator("#action-said")).to_have_text("drain: as asked")
        assert [order["action"] for order in source.orders] == ["drain"]
        expect(page.locator("#audit")).to_contain_text("drain everything")
        page.close()


def test_a_token_is_asked_for_and_kept_in_the_tab(browser: Browser) -> None:
    with serving(SaidSource(), Access(TOKEN)) as url:
        context = browser.new_context()
        page = context.new_page()
        page.goto(url)
        expect(page.locator("#token")).to_be_visible()
        page.locator("#secret").fill("wrong-wrong-wrong")
        page.get_by_role("button", name="Use it").click()
        expect(page.locator("#token-problem")).to_contain_text("a bearer token is needed")
        page.locator("#secret").fill(TOKEN)
        page.get_by_role("button", name="Use it").click()
        expect(page.locator("#token")).not_to_be_visible()
        expect(page.locator("#gpus article")).to_have_count(7)
        assert page.evaluate("localStorage.length") == 0
        assert TOKEN not in page.url
        context.close()


def test_where_anyone_may_read_who_acts_is_asked_for_the_token(browser: Browser) -> None:
    source = SaidSource()
    with serving(source, Access(TOKEN, open_reads=True)) as url:
        page = browser.new_page()
        page.goto(url)
        expect(page.locator("#gpus article")).to_have_count(7)
        expect(page.locator("#token")).not_to_be_visible()
        expect(page.locator("#audit")).to_contain_text("Not shown: a bearer token is needed")
        page.get_by_role("button", name="End every drain").click()
        expect(page.locator("#token")).to_be_visible()
        assert source.orders == []
        page.locator("#secret").fill(TOKEN)
        page.get_by_role("button", name="Use it").click()
        expect(page.locator("#token")).not_to_be_visible()
        page.get_by_role("button", name="End every drain").click()
        expect(page.locator("#action-said")).to_have_text("resume: as asked")
        expect(page.locator("#audit")).to_contain_text("resume")
        page.close()
