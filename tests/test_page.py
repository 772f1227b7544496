"""The chat page in a real browser, beside a server without a model: what a reader sees, and what is sent.

Needs playwright and a Chromium (`apt install chromium`, or its path in CHROMIUM), and for accessibility
axe-playwright-python: the extra `page-tests`. Without them the tests skip.
"""

import json
import os
import re
import shutil
import urllib.request
from pathlib import Path
from threading import Event

import pytest
from fake_chat_server import PAGE, Error, FakeChatServer, answer, chunk, stream

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
BROWSER_TESTS = pytest.mark.slow
PATIENCE = 60  # seconds that a busy machine may take for one step
ANSWER = "[aria-label='Answer again']"  # the button that a finished answer has


def test_page_is_one_small_file_that_makes_no_html_of_text():
    page = PAGE.read_text()
    script = re.search("<script>(.*)</script>", page, re.DOTALL).group(1)
    assert len(page.encode()) <= 60_000
    assert page.count("<script") == page.count("<style") == 1
    assert not re.findall(r"\sstyle=|\son\w+=\"", page)  # the security policy forbids them
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|new Function", script)
    assert set(re.findall(r"https?://[\w.]+", page)) == {"http://www.w3.org"}  # the name of SVG, not an address


# ---- In a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: extra page-tests")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt install chromium, or give its path in CHROMIUM")
    with playwright.sync_playwright() as driver:
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"] if root else [])
        yield browser
        browser.close()


@pytest.fixture
def fake():
    fake = FakeChatServer()
    yield fake
    fake.stop()


@pytest.fixture(scope="module")
def problems():
    """What pages did that they must not do: errors, dialogs, requests to other machines."""
    return []


@pytest.fixture(scope="module")
def common_page(browser, problems):
    """A page for all tests that need no profile of their own.

    Each test's server has a port of its own, and so an origin: what the page keeps is not seen by the next test.
    """
    return new_page(browser, problems)


@pytest.fixture
def open_page(browser, fake, problems, common_page):
    """Return a function that opens the page of a server, by default the fake one.

    init: a script to run first. options: Playwright's, of a context. With either, the page has a new browser profile.

    At the end, there must have been no error in the page and no request to another machine.
    """
    contexts = []

    def open_page(init: str = "", url: str = fake.url, **options):
        page = new_page(browser, problems, init, **options) if init or options else common_page
        contexts.append(page.context)
        page.goto(url)
        page.locator(".station").first.wait_for()
        return page

    yield open_page
    for context in {*contexts} - {common_page.context}:
        context.close()
    common_page.goto("about:blank")  # which ends what it still asks for
    found = [*problems]
    problems.clear()
    assert found == []


def new_page(browser, problems: list, init: str = "", **options):
    """Open a page in a new browser profile. problems: gets a line for each."""

    def watch(request):
        if not request.url.startswith(("http://127.0.0.1:", "data:", "blob:", "about:blank")):
            problems.append(f"outside request: {request.url}")

    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)
    context.add_init_script(init)
    context.set_default_timeout(1000 * PATIENCE)
    page = context.new_page()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if is_error(message) else None)
    page.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
    page.on("request", watch)
    return page


def is_error(message) -> bool:
    """Whether a line of the console is the page's own fault, and not an answer of the server's that is an error."""
    return message.type in ("error", "warning") and "Failed to load resource" not in message.text


def expect(locator):
    from playwright.sync_api import expect

    expect.set_options(timeout=1000 * PATIENCE)
    return expect(locator)


def ask(page, question: str, *, wait: bool = True):
    """Type a question, send it, and wait for the end of all answers."""
    page.fill("#box", question)
    page.press("#box", "Enter")
    if wait:
        wait_for_end(page)


def wait_for_end(page):
    """Wait until all answers have ended and are shown. What is new of them is drawn in the next frame."""
    expect(page.locator("#send")).to_have_attribute("aria-label", "Send")
    page.evaluate("new Promise(requestAnimationFrame)")


def last(page):
    """The last answer's text."""
    return page.locator(".answer .body").last


def slowly(*texts: str, pause: float = 0.01):
    """A stream of texts with a pause after each, without its end."""
    yield stream([chunk({"role": "assistant", "content": ""}, jaxchat={"seed": 3})], done=False)
    for text in texts:
        yield stream([chunk({"content": text})], done=False)
        yield pause


@BROWSER_TESTS
def test_answer_is_streamed_and_said_at_its_end(open_page, fake):
    gate = Event()
    fake.reply = lambda body: [*slowly("Once ", "upon"), gate, stream(answer(" a time.", tokens=40))]
    page = open_page()
    ask(page, "Tell me a story", wait=False)
    expect(last(page)).to_have_text("Once upon")
    busy = page.locator(".answer")
    expect(busy).to_have_attribute("aria-busy", "true")
    expect(page.locator(".figures").last).to_contain_text("≈")  # tokens and tokens/s so far
    expect(page.locator("#status")).not_to_contain_text("Once")  # a screen reader doesn't hear each token
    gate.set()
    expect(last(page)).to_have_text("Once upon a time.")
    expect(busy).to_have_attribute("aria-busy", "false")
    expect(page.locator("#status")).to_contain_text("Once upon a time.")
    expect(page.locator(".figures").last).to_have_text("40 tokens 80 tokens/s seed 7")
    expect(page.locator("#box")).to_be_focused()
    assert page.locator("[aria-live]").count() == 0  # none around the text that grows; role=status is one


@BROWSER_TESTS
def test_stream_cut_at_every_byte(open_page):
    page = open_page()
    events = [chunk({"content": "é😀\u0301"}), chunk({"content": "\r\n\n"}, "stop")]
    data = b": ping\n\n" + stream(events).replace(b"}\n\ndata", b"}\r\n\r\ndata")
    found = page.evaluate(
        """async (bytes) => {
            const read = async (pieces) => {
                const found = [];
                const body = new Blob([]).stream().constructor === ReadableStream && new ReadableStream({
                    start(control) {
                        for (const piece of pieces) if (piece.length) control.enqueue(new Uint8Array(piece));
                        control.close();
                    },
                });
                for await (const event of events(body)) found.push(event);
                return JSON.stringify(found);
            };
            const cuts = bytes.map((_, i) => [bytes.slice(0, i), bytes.slice(i)]);
            return Promise.all([...cuts, bytes.map((byte) => [byte])].map(read));
        }""",
        list(data),
    )
    assert len(found) == len(data) + 1
    assert all(json.loads(one) == events for one in found)


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "[a](javascript:alert(1))",
    "[a](data:text/html,<script>alert(1)</script>)",
    "<a href='javascript:alert(1)'>b</a>",
    "![x](https://example.org/tracker.png)",
    '```"><img src=x onerror=alert(1)>\ncode\n```',
    "# <svg onload=alert(1)>",
    "- > <b>x</b> <iframe src=x>",
]


@BROWSER_TESTS
def test_hostile_text_stays_text(open_page, fake):
    tool = {"id": HOSTILE[0], "code": HOSTILE[1], "output": HOSTILE[0]}
    fake.reply = lambda body: [stream(answer("\n\n".join(HOSTILE), tool))]
    page = open_page()
    ask(page, HOSTILE[0] + HOSTILE[1])
    page.reload()
    expect(page.locator(".answer")).to_have_count(1)
    assert page.locator("#turns, #list").locator("img, script, iframe, svg:not(.icon), b, form").count() == 0
    assert [a.get_attribute("href") for a in page.locator(".answer a").all()] == ["https://example.org/tracker.png"]
    expect(page.locator(".question h2")).to_contain_text(HOSTILE[0] + HOSTILE[1])
    for text in ("<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "javascript:alert(1)"):
        expect(last(page)).to_contain_text(text)
    expect(page.locator(".tool output")).to_have_text(HOSTILE[0])


AWAY = 'target="_blank" rel="noopener noreferrer"'
MARKDOWN = {
    "a **bold** and *it* `x*y`": "<p>a <strong>bold</strong> and <em>it</em> <code>x*y</code></p>",
    "2*3*4, 2**3**2, __init__, a_b_c": "<p>2*3*4, 2**3**2, __init__, a_b_c</p>",
    "***both*** and _it_ ~~no~~": "<p><strong><em>both</em></strong> and <em>it</em> <del>no</del></p>",
    r"\*not\* **open": "<p>*not* **open</p>",
    "one\ntwo\n\nthree": "<p>one<br>two</p><p>three</p>",
    "## Head ##\ntext": "<h5>Head</h5><p>text</p>",
    "- a\n  - b\n- c": "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>",
    "3. a\n4. b\n\ntext": '<ol start="3"><li>a</li><li>b</li></ol><p>text</p>',
    "It was\n1986. A year": "<p>It was<br>1986. A year</p>",
    "> a\n> b": "<blockquote><p>a<br>b</p></blockquote>",
    "---": "<hr>",
    "see http://a.b/c_d.": f'<p>see <a href="http://a.b/c_d" {AWAY}>http://a.b/c_d</a>.</p>',
    "[x](mailto:a@b.c) [y](/z)": f'<p><a href="mailto:a@b.c" {AWAY}>x</a> [y](/z)</p>',
    "``a`b`` `open": "<p><code>a`b</code> `open</p>",
}


@BROWSER_TESTS
def test_markdown(open_page):
    page = open_page()
    found = page.evaluate(
        """(sources) => sources.map((source) => {
            const node = document.createElement("div");
            for (let end = 0; end <= source.length; end++) showMarkdown(node, source.slice(0, end)); // as it streams
            return node.innerHTML;
        })""",
        list(MARKDOWN),
    )
    assert dict(zip(MARKDOWN, found, strict=True)) == MARKDOWN


@BROWSER_TESTS
def test_markdown_of_any_text_ends_soon(open_page):
    page = open_page()
    texts = [
        "*" * 20000,
        "[" * 20000,
        "`a" * 10000,
        "> " * 5000,
        "**a " * 5000,
        "- " * 5000 + "x",
        "`a``b" * 3000,
        "_a *b " * 4000,
    ]
    times = page.evaluate(
        """(texts) => texts.map((text) => {
            const began = performance.now();
            showMarkdown(document.createElement("div"), text);
            return performance.now() - began;
        })""",
        texts,
    )
    assert max(times) < 20_000  # milliseconds, on a busy machine: each takes less than 100


@BROWSER_TESTS
def test_code_is_copied(open_page, fake):
    fake.reply = lambda body: [stream(answer("So:\n\n```python\nif a < b:\n    print(a)\n```\n\ndone"))]
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    ask(page, "code?")
    page.click("figure.code button")
    expect(page.locator("#toast")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "if a < b:\n    print(a)"
    page.click("[aria-label='Copy the answer']")
    assert page.evaluate("navigator.clipboard.readText()").startswith("So:\n\n```python")


@BROWSER_TESTS
@pytest.mark.parametrize("by", ["Escape", "button"])
def test_stop_closes_the_connection(open_page, fake, by):
    fake.reply = lambda body: slowly(*["word "] * 5000)
    page = open_page()
    ask(page, "go", wait=False)
    expect(last(page)).to_contain_text("word word")
    page.press("#box", "Escape") if by == "Escape" else page.click("[aria-label=Stop]")
    assert fake.gone.wait(PATIENCE)
    expect(page.locator(".answer")).to_contain_text("stopped")
    expect(page.locator("#status")).to_contain_text("stopped")
    expect(page.locator("#box")).to_be_focused()
    page.reload()
    expect(last(page)).to_contain_text("word word")  # what came is kept


@BROWSER_TESTS
def test_answer_again(open_page, fake):
    fake.reply = lambda body: [stream(answer(f"answer {len(fake.requests)}"))]
    page = open_page()
    ask(page, "first")
    page.click(ANSWER)
    expect(last(page)).to_have_text("answer 2")
    assert fake.requests[0]["messages"] == fake.requests[1]["messages"]
    page.click("[aria-label='Previous answer']")
    expect(last(page)).to_have_text("answer 1")
    ask(page, "second")
    assert fake.requests[2]["messages"][1] == {"role": "assistant", "content": "answer 1"}  # the one that was shown
    page.locator(".turn").first.hover()
    page.locator(ANSWER).first.click()  # further up: a branch
    expect(page.locator(".turn")).to_have_count(1)
    expect(last(page)).to_have_text("answer 4")


@BROWSER_TESTS
def test_edited_question_makes_a_branch(open_page, fake):
    fake.reply = lambda body: [stream(answer("to: " + body["messages"][-1]["content"]))]
    page = open_page()
    ask(page, "one")
    ask(page, "two")
    page.press("#box", "ArrowUp")
    expect(page.locator("#edit")).to_be_focused()
    page.press("#edit", "Escape")
    expect(page.locator("#box")).to_be_focused()
    page.locator(".turn").first.hover()
    page.locator("[aria-label='Edit the question']").first.click()
    page.fill("#edit", "uno")
    page.press("#edit", "Enter")
    expect(last(page)).to_have_text("to: uno")
    expect(page.locator(".turn")).to_have_count(1)
    assert len(fake.requests[-1]["messages"]) == 1
    expect(page.locator(".pager")).to_have_text("2/2")
    page.click("[aria-label='Previous branch']")
    expect(page.locator(".turn h2")).to_have_text(["You: one", "You: two"])


@BROWSER_TESTS
def test_cut_off_answer_goes_on(open_page, fake):
    tool = [{"id": "t", "code": "1+1"}, {"id": "t", "output": "2", "made_up": False}]
    fake.reply = lambda body: [stream(answer("It is ", *tool, "2, so", finish="length"))]
    page = open_page()
    ask(page, "sum?")
    expect(page.locator(".answer")).to_contain_text("cut off at the token limit")
    fake.reply = lambda body: [stream(answer(" there."))]
    page.click("text=Continue")
    expect(last(page)).to_contain_text("2, so there.")
    expect(page.locator("text=Continue")).to_have_count(0)
    sent = fake.requests[-1]
    assert sent["continue_final_message"] is True
    kinds = [("text", "It is "), ("python", "1+1"), ("python_output", "2"), ("text", "2, so")]
    assert sent["messages"][-1] == {"role": "assistant", "content": [{"type": a, "text": b} for a, b in kinds]}


@BROWSER_TESTS
def test_tool_calls_are_cards(open_page, fake):
    call = {"id": "a", "code": "23*7"}
    gate = Event()
    fake.reply = lambda body: [stream([chunk({"jaxchat": {"tool": call}})], done=False), gate, stream(answer(
        {"id": "a", "output": "161", "made_up": False}, {"id": "b", "code": "9*9"},
        {"id": "b", "output": "80", "made_up": True}))]  # fmt: skip
    page = open_page()
    ask(page, "sum?", wait=False)
    expect(page.locator(".tool")).to_contain_text("…")
    gate.set()
    cards = page.locator(".tool")
    expect(cards).to_have_text(
        [re.compile(r"calculator\s*23\*7\s*=\s*161$"), re.compile(r"9\*9\s*=\s*80\s*made-up output")]
    )
    assert fake.requests[0]["tool_display"] == "events"


@BROWSER_TESTS
def test_settings_are_sent_and_kept(open_page, fake):
    page = open_page()
    ask(page, "hi")
    first = fake.requests[-1]
    assert {"temperature": 0.6, "top_k": 50, "top_p": 1, "stream": True}.items() <= first.items()
    assert not {"max_tokens", "seed"} & set(first)
    page.click("#settings-button")
    values = {"temperature": "0", "top_k": "7", "top_p": "0.9", "max_tokens": "33", "seed": "42"}
    for name, value in values.items():
        page.fill("#" + name, value)
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "9")  # not sent
    expect(page.locator("#temperature")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#temperature-help")).to_have_text("0 to 2")
    page.reload()
    ask(page, "again")
    sent = fake.requests[-1]
    assert {name: sent[name] for name in values} == {name: float(value) for name, value in values.items()}
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    page.click("text=seed 7")  # the answer's seed, for what comes
    ask(page, "third")
    assert fake.requests[-1]["seed"] == 7
    expect(page.locator("#summary")).to_have_text("temperature 0 · top-k 7 · seed 7")


@BROWSER_TESTS
def test_checkpoints_side_by_side(open_page, fake):
    fake.reply = lambda body: [stream(answer(f"{body['model']} says {len(body['messages'])}"))]
    page = open_page()
    expect(page.locator(".station")).to_have_text(["base", "mid", "sft", "rl"])
    page.click("text=sft")
    ask(page, "one")
    assert fake.requests[-1]["model"] == "d12-sft"
    page.click("#compare")
    page.locator(".station").nth(1).click()  # without mid
    ask(page, "two")
    lanes = page.locator(".turn").last.locator(".answer .body")
    expect(lanes).to_have_text(["d12-base says 3", "d12-sft says 3", "d12-rl says 3"])
    ask(page, "three")
    by_model = {body["model"]: body["messages"] for body in fake.requests[-3:]}
    assert [by_model[f"d12-{stage}"][3]["content"] for stage in ("base", "sft", "rl")] == [
        "d12-base says 3", "d12-sft says 3", "d12-rl says 3"]  # each has its own answers before it # fmt: skip
    boxes = [lane.bounding_box() for lane in page.locator(".turn").last.locator(".answer").all()]
    assert len({box["y"] for box in boxes}) == 1 and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    page.click("#compare")
    page.click("text=mid")
    ask(page, "four")
    assert len(fake.requests) == 8 and fake.requests[-1]["model"] == "d12-mid"


@BROWSER_TESTS
def test_list_of_conversations(open_page, fake):
    page = open_page()
    for question in ("apples", "pears"):
        page.click("#new")
        ask(page, question)
    titles = page.locator(".item .cut")
    expect(titles).to_have_text(["pears", "apples"])
    page.reload()
    expect(titles).to_have_text(["pears", "apples"])
    expect(page.locator(".turn h2")).to_have_text("You: pears")
    titles.nth(1).click()
    page.fill("#title", "fruit")
    page.press("#title", "Enter")
    expect(titles).to_have_text(["pears", "fruit"])
    page.press("body", "Control+k")
    expect(page.locator("#search")).to_be_focused()
    page.keyboard.type("APPLE")
    expect(titles).to_have_count(1)  # found in the question
    page.keyboard.press("Enter")
    expect(page.locator("#title")).to_have_value("fruit")
    page.fill("#search", "")
    page.click("[aria-label='Delete “fruit”']")
    expect(titles).to_have_text(["pears"])
    expect(page.locator("#welcome")).to_be_visible()
    page.click("text=Undo")
    expect(titles).to_have_text(["pears", "fruit"])


@BROWSER_TESTS
def test_draft_is_kept(open_page, fake):
    page = open_page()
    ask(page, "one")
    page.fill("#box", "half a th")
    page.click("#new")
    expect(page.locator("#box")).to_have_value("")
    page.fill("#box", "another")
    page.reload()
    expect(page.locator("#box")).to_have_value("another")
    page.click(".item .cut")
    expect(page.locator("#box")).to_have_value("half a th")


@BROWSER_TESTS
@pytest.mark.parametrize(
    "value", ["get() { throw new Error('blocked'); }", "value: { setItem() { throw new Error('full'); } }"]
)
def test_browser_that_keeps_nothing(open_page, fake, value):
    page = open_page(init=f"Object.defineProperty(window, 'localStorage', {{ {value} }})")
    ask(page, "hi")
    expect(last(page)).to_have_text("Hello.")
    expect(page.locator("#toast")).to_contain_text("storage is full")
    page.click("[aria-label^=Delete]")
    expect(page.locator(".item")).to_have_count(0)


@BROWSER_TESTS
def test_error_can_be_retried(open_page, fake):
    def refuse(body):
        raise Error(429, "the queue is full", "rate_limit_exceeded", {"Retry-After": "2"})

    fake.reply = refuse
    page = open_page()
    ask(page, "hello?")
    expect(page.locator(".failed")).to_have_text("the queue is full. Try again in 2 s.")
    expect(page.locator(".turn h2")).to_have_text("You: hello?")
    fake.reply = lambda body: [stream(answer("Hello.")[:2] + [{"error": {"message": "server shutting down"}}])]
    page.click("text=Retry")
    expect(page.locator(".failed")).to_have_text("server shutting down")
    fake.reply = lambda body: [stream(answer("Hello."))]
    page.click("text=Retry")
    expect(last(page)).to_have_text("Hello.")
    expect(page.locator(".failed:visible")).to_have_count(0)


@BROWSER_TESTS
def test_server_that_is_killed_and_restarted(open_page, fake):
    fake.reply = lambda body: slowly(*["word "] * 5000)
    page = open_page()
    ask(page, "go", wait=False)
    expect(last(page)).to_contain_text("word word")
    fake.stop()
    expect(page.locator(".failed")).to_contain_text("before the answer was complete")
    expect(last(page)).to_contain_text("word word")
    expect(page.locator("#notice")).to_contain_text("The server can't be reached.")
    page.click("#turns >> text=Retry")
    expect(page.locator(".failed").last).to_have_text("The server can't be reached.")
    fake.reply = lambda body: [stream(answer("Back."))]
    fake.restart()
    expect(page.locator("#notice")).to_be_hidden()  # it looks for the server by itself
    page.locator("#turns >> text=Retry").last.click()
    expect(last(page)).to_have_text("Back.")


def waiting(url: str) -> float:
    """Answers that wait for a slot, by the server's metrics."""
    with urllib.request.urlopen(f"{url}/metrics") as response:
        return sum(map(float, re.findall(r"num_requests_waiting{.*} (.*)", response.read().decode())))


@BROWSER_TESTS
def test_real_server_that_is_killed_and_restarted(open_page, tmp_path):
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    from serve_helpers import open_request, save_models, serve_command, until

    save_models(tmp_path, "base", "sft")
    with serve_command(tmp_path, "--source=sft,base") as (process, port):
        page = open_page(url=f"http://127.0.0.1:{port}")
        page.click("#compare")
        page.click("#settings-button")
        page.fill("#seed", "5")
        ask(page, "the cat")
        said = page.locator(".answer .body").all_inner_texts()
        assert len({*said}) == 2 and all(said)
        page.click("#compare")
        # A long queue, so that the next answer has hardly begun when the server dies.
        busy = [open_request(port, {"model": f"d1-{stage}", "n": 16, "stream": True, "ignore_eos": True})
                for stage in ("base", "sft") for _ in range(15)]  # fmt: skip
        until(lambda: waiting(f"http://127.0.0.1:{port}") > 200)
        with page.expect_response("**/chat/completions"):
            ask(page, "the cat and", wait=False)
        process.kill()
        for client in busy:
            client.close()
        # The page may or may not have seen that the answer began.
        expect(page.locator(".failed:visible")).to_have_text(
            re.compile("The connection broke before the answer was complete|The server can't be reached")
        )
        expect(page.locator("#notice")).to_contain_text("The server can't be reached.")
    with serve_command(tmp_path, "--source=sft,base", port=port):
        expect(page.locator("#notice")).to_be_hidden()
        page.click("#turns >> text=Retry")
        wait_for_end(page)
        expect(page.locator(".failed:visible")).to_have_count(0)
        page.click("#new")
        page.click("#compare")
        ask(page, "the cat")
        assert page.locator(".answer .body").all_inner_texts() == said  # by the same seed


@BROWSER_TESTS
def test_conversation_longer_than_the_context(open_page, fake):
    fake.reply = lambda body: [stream(answer("ok"))]
    fake.count = lambda body: 60 * len(body["messages"])  # of 256: three messages leave a quarter, four don't
    page = open_page()
    for question in ("one", "two", "three", "four"):
        ask(page, question)
    assert [message["content"] for message in fake.requests[-1]["messages"]] == ["three", "ok", "four"]
    expect(page.locator(".figures").last).to_contain_text("2 oldest exchanges left out")
    assert len(fake.requests) == 4
    assert [len(body["messages"]) for body in fake.counted] == [3, 5, 3, 5, 3]  # what left is not tried again

    def refuse(body):
        raise Error(400, "lower max_tokens", "context_length_exceeded")

    fake.reply = refuse
    page.click("#settings-button")
    page.fill("#max_tokens", "250")
    ask(page, "five")
    expect(page.locator(".failed:visible")).to_have_text("lower max_tokens")
    assert len(fake.requests[-1]["messages"]) == 3  # nothing left for Max tokens


@BROWSER_TESTS
def test_half_a_tool_call_is_not_continued(open_page, fake):
    fake.reply = lambda body: [stream(answer("It is ", {"id": "t", "code": "12+3"}, finish="length"))]
    page = open_page()
    ask(page, "sum?")
    fake.reply = lambda body: [
        stream(answer({"id": "t", "code": "12+34"}, {"id": "t", "output": "4", "made_up": False}, finish="length"))
    ]
    page.click("#settings-button")
    page.fill("#temperature", "0")
    for code in ("12+34", "12+34"):  # the call was cut, then its output
        page.click("text=Continue")
        wait_for_end(page)
        assert fake.requests[-1]["messages"][-1] == {"role": "assistant", "content": "It is "}
        expect(page.locator(".tool")).to_contain_text([code])
    assert fake.requests[-1]["temperature"] == 0  # the settings of now


@BROWSER_TESTS
def test_two_tabs_on_one_conversation(open_page, fake):
    gate = Event()
    fake.reply = lambda body: [
        *slowly("to "), *[gate] * (body["messages"][-1]["content"] == "three"), stream(answer("you"))]  # fmt: skip
    page = open_page()
    ask(page, "one")
    other = page.context.new_page()
    other.goto(fake.url)
    ask(page, "two")
    turns = other.locator(".turn h2")
    expect(turns).to_have_text(["You: one", "You: two"])
    ask(other, "three", wait=False)
    expect(page.locator(".turn h2").last).to_have_text("You: three")
    ask(page, "four")
    gate.set()
    wait_for_end(other)
    other.reload()
    kept = "JSON.parse(Object.entries(localStorage).find(([name]) => name.startsWith('jaxchat.c.'))[1]).turns"
    said = f"{kept}.map(({{question, answers}}) => [question, Object.values(answers)[0][0].parts[0].text])"
    assert other.evaluate(said) == [[question, "to you"] for question in ("one", "two", "three", "four")]
    other.close()


@BROWSER_TESTS
def test_question_waits_while_the_server_loads(open_page, fake):
    def refuse(body):
        raise Error(503, "the model is still being loaded", None, {"Retry-After": "5"})

    fake.health, fake.reply = "loading", refuse
    page = open_page()
    expect(page.locator("#notice")).to_contain_text("The server says: loading")
    ask(page, "hi", wait=False)
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "true")
    fake.health, fake.reply = "ok", lambda body: [stream(answer("Hello."))]
    expect(last(page)).to_have_text("Hello.")
    expect(page.locator("#notice")).to_be_hidden()


@BROWSER_TESTS
def test_api_key(open_page, fake):
    page = open_page()
    fake.key = "secret"
    page.reload()
    expect(page.locator("#notice")).to_contain_text("API key")
    page.click("text=Enter it")
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type("secret")
    page.press("#key", "Enter")
    page.locator(".station").first.wait_for()
    expect(page.locator("#notice")).to_be_hidden()
    page.reload()
    ask(page, "hi")
    expect(last(page)).to_have_text("Hello.")


@BROWSER_TESTS
def test_export_and_import(open_page, fake, tmp_path):
    page = open_page()
    ask(page, "keep me")
    page.click("#settings-button")
    with page.expect_download() as waiting:
        page.click("#export")
    exported = json.loads(Path(waiting.value.path()).read_text())
    (conversation,) = exported["conversations"]
    assert conversation["turns"][0]["question"] == "keep me"
    assert [one["parts"][0]["text"] for one in conversation["turns"][0]["answers"]["d12-rl"]] == ["Hello."]

    other = open_page(locale="en")
    bad = {"format": "jaxchat-conversations", "conversations": [{"turns": [{"question": "q", "answers": {"m": [3]}}]}]}
    for name, text in {"bad.json": json.dumps(bad), "not.json": "{"}.items():
        (tmp_path / name).write_text(text)
        other.set_input_files("#file", tmp_path / name)
        expect(other.locator("#toast")).to_contain_text("nothing was imported")
    conversation["turns"][0]["parent"] = conversation["turns"][0]["id"]  # a circle
    (tmp_path / "good.json").write_text(json.dumps(exported))
    for count in (1, 2):  # the second does not replace the first
        other.set_input_files("#file", tmp_path / "good.json")
        expect(other.locator(".item")).to_have_count(count)
    other.locator(".item .cut").first.click()
    expect(last(other)).to_have_text("Hello.")


LINES = ["a line\n\n"] * 60


@BROWSER_TESTS
def test_end_stays_in_sight_unless_the_reader_scrolls_up(open_page, fake):
    first, second = Event(), Event()
    fake.reply = lambda body: [*slowly(*LINES), first, *slowly(*LINES), second, stream(answer("the end"))]
    page = open_page()
    ask(page, "go", wait=False)
    lines = page.locator(".body p")
    expect(lines).to_have_count(len(LINES))
    expect(lines.last).to_be_in_viewport()
    expect(page.locator("#latest")).to_be_hidden()
    page.evaluate("$('scroll').scrollTop -= 400")
    expect(page.locator("#latest")).to_be_visible()
    seen = page.evaluate("$('scroll').scrollTop")
    first.set()
    expect(lines).to_have_count(2 * len(LINES))
    assert page.evaluate("$('scroll').scrollTop") == seen
    page.click("#latest")
    expect(page.locator("#latest")).to_be_hidden()
    second.set()
    expect(page.locator(ANSWER)).to_be_in_viewport()


@BROWSER_TESTS
def test_colours_by_system_and_by_switch(open_page):
    page = open_page(color_scheme="dark", reduced_motion="reduce")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.click("#settings-button")
    page.select_option("#theme", "light")
    light = page.evaluate(ground)
    page.reload()
    assert page.evaluate(ground) == light != dark
    page.emulate_media(color_scheme="light")
    page.click("#settings-button")
    page.select_option("#theme", "dark")
    assert page.evaluate(ground) == dark


@BROWSER_TESTS
def test_phone(open_page, fake):
    fake.reply = lambda body: [stream(answer("# " + "wide" * 99 + "\n\n```\n" + "x" * 300 + "\n```"))]
    page = open_page(viewport={"width": 320, "height": 640}, has_touch=True, is_mobile=True)
    page.fill("#box", "one")
    page.press("#box", "Enter")  # a line
    page.keyboard.type("two")
    page.tap("#send")
    expect(page.locator(".turn h2")).to_have_text("You: one\ntwo")
    wait_for_end(page)
    page.tap("#compare")
    page.fill("#box", "a" * 300)
    page.tap("#send")
    wait_for_end(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    assert page.evaluate("document.getElementById('scroll').scrollWidth") <= 320
    for name in ("list", "settings"):
        page.tap(f"#{name}-button")
        expect(page.locator(f"#{name}")).to_be_in_viewport(ratio=1)
        page.keyboard.press("Escape")
        expect(page.locator(f"#{name}")).to_be_hidden()
        expect(page.locator(f"#{name}-button")).to_be_focused()


@BROWSER_TESTS
def test_keyboard_alone(open_page, fake):
    page = open_page()
    expect(page.locator("#box")).to_be_focused()
    keys = page.keyboard

    def tab_to(label: str, key: str = "Tab"):
        for _ in range(40):
            name = page.evaluate("document.activeElement.ariaLabel || document.activeElement.textContent")
            if name.strip().startswith(label):
                return
            keys.press(key)
        raise AssertionError(f"{label} is not reached by {key}")

    keys.type("one")
    keys.press("Shift+Enter")
    keys.type("two")
    keys.press("Enter")
    expect(page.locator(".turn h2")).to_have_text("You: one\ntwo")
    wait_for_end(page)
    tab_to("Answer again", "Shift+Tab")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # the focus is seen
    keys.press("Enter")
    expect(page.locator(".pager")).to_have_text("2/2")
    expect(page.locator("#box")).to_be_focused()
    tab_to("Compare", "Shift+Tab")
    keys.press("Space")
    expect(page.locator("#compare")).to_have_attribute("aria-pressed", "true")
    tab_to("Settings", "Tab")
    keys.press("Enter")
    expect(page.locator("#temperature")).to_be_focused()
    keys.press("Escape")
    keys.press("Control+k")
    keys.press("Enter")
    expect(page.locator("#box")).to_be_focused()
    tab_to("New conversation", "Shift+Tab")


@BROWSER_TESTS
@pytest.mark.parametrize("width, scheme", [(320, "dark"), (1280, "light")])
def test_accessibility(open_page, fake, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed: extra page-tests")
    parts = [
        "# A\n\n> b\n\n- c `d`\n\n```py\ne\n```\n\nhttps://j.k",
        {"id": "t", "code": "1", "output": "2", "made_up": True},
    ]
    fake.reply = lambda body: [stream(answer(*parts, finish="length"))]
    page = open_page(color_scheme=scheme, viewport={"width": width, "height": 800})

    def check(what: str):
        results = axe.Axe().run(page)
        assert results.violations_count == 0, f"{what}: {results.generate_report()}"

    check("the first page")
    page.click("#compare")
    ask(page, "all of it")
    fake.stop()
    ask(page, "nobody there")
    check("answers and errors")
    fake.restart()
    page.press("#box", "ArrowUp")
    page.click("#settings-button")
    check("settings")
    if width < 900:
        page.click("#close-settings")
        page.click("#list-button")
        check("the list")
