"""The server around a real engine, and real clients of it: what they get is what Engine.generate says.

The model is the small one of conftest.py. With JAXCHAT_TEST_BASE_DIR=DIR it is the SFT model in that base
directory, as of the demo: JAXCHAT_TEST_BASE_DIR=~/.cache/jaxchat/demo pytest tests/test_serve_engine.py
"""

import contextlib
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from serve_helpers import Running, events_of, until

pytest.importorskip("uvicorn", reason="needs the extra serve")

from jaxchat import checkpoint  # noqa: E402
from jaxchat.config import Compute  # noqa: E402
from jaxchat.infer.engine import Engine  # noqa: E402
from jaxchat.infer.text import TextReader  # noqa: E402

SLOTS = 16
COMPUTE = Compute(attention="blocks")  # shapes of tests/test_engine.py, compiled once for both
QUESTION = [{"role": "user", "content": "the cat"}]

if os.environ.get("JAXCHAT_TEST_BASE_DIR"):

    @pytest.fixture(scope="module")
    def model():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("JAXCHAT_BASE_DIR", os.path.expanduser(os.environ["JAXCHAT_TEST_BASE_DIR"]))
            yield checkpoint.open_model("sft")

    @pytest.fixture(scope="module")
    def tokenizer(model):
        return model.tokenizer

    @pytest.fixture(scope="module")
    def config(model):
        return model.config

    @pytest.fixture(scope="module")
    def params(model):
        return model.load()


@pytest.fixture(scope="module")
def engine(params, config, tokenizer):
    """The engine that answers are compared with; not the server's."""
    return Engine(params, config, tokenizer, COMPUTE, batch_size=SLOTS)


@pytest.fixture(scope="module")
def serving(params, config, tokenizer):
    @contextlib.contextmanager
    def opened(on_progress):
        yield Engine(params, config, tokenizer, COMPUTE, batch_size=SLOTS)

    options = {"slots": SLOTS, "max_waiting": 64, "context": config.sequence_len, "stages": ("sft",)}
    with Running(tokenizer, opened, **options) as running:
        yield running.wait_until_ok()


@pytest.fixture(scope="module")
def client(serving):
    openai = pytest.importorskip("openai", reason="needs the extra dev")
    with openai.OpenAI(base_url=f"{serving.url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def ids_of(serving, prompt) -> list[int]:
    return serving.ask("POST", "/tokenize", {"prompt": prompt}).json["tokens"]


def random_ask(random, i: int) -> dict:
    """A request for a completion, with settings of all kinds."""
    asked = {
        "prompt": random.integers(0, 250, random.integers(1, 50)).tolist(),
        "seed": i,
        "n": int(random.integers(1, 3)),
    }
    asked["max_tokens"] = int(random.integers(1, 30))
    asked["temperature"] = float(random.choice([0.0, 0.7, 1.5]))
    asked["top_k"], asked["top_p"] = int(random.choice([0, 3, 50])), float(random.choice([1.0, 0.5]))
    return asked | {"stream": bool(random.integers(2)), "min_tokens": int(random.choice([0, 0, 5]))}


def texts_of(reply, n: int) -> list[str]:
    """The texts of a completion's answers, streamed or not."""
    if "event-stream" in reply.headers["content-type"]:
        choices = [choice for event in events_of(reply.body)[:-1] for choice in event["choices"]]
        return ["".join(choice["text"] for choice in choices if choice["index"] == i) for i in range(n)]
    return [choice["text"] for choice in reply.json["choices"]]


def shown_text(generation, tokenizer) -> str:
    """An answer's text, without special tokens and what the tool was asked and said."""
    reader = TextReader(tokenizer)
    said = [pair for pair in zip(generation.tokens, generation.forced, strict=True) if pair[0] not in reader.unseen]
    deltas = [delta for pair in said for delta in reader.feed(*pair)] + reader.end()
    return "".join(delta.text for delta in deltas if delta.kind == "text")


def test_answers_are_those_of_generate_whatever_runs_beside(serving, engine, tokenizer):
    """48 requests of all kinds at a time, some of whose neighbours leave."""
    random = np.random.default_rng(4)
    asked = [random_ask(random, i) for i in range(48)]
    with ThreadPoolExecutor(24) as pool:
        replies = [*pool.map(lambda fields: serving.ask("POST", "/v1/completions", fields), asked)]
    seen = set()
    for fields, reply in zip(asked, replies, strict=True):
        assert reply.status == 200, reply.body
        settings = {
            name: fields[name] for name in ("seed", "max_tokens", "temperature", "top_k", "top_p", "min_tokens")
        }
        want = engine.generate([fields["prompt"]], num_samples=fields["n"], **settings)
        texts = texts_of(reply, fields["n"])
        assert texts == [shown_text(one, tokenizer) for one in want], fields
        seen |= {*texts}
    assert len(seen) > 40


def test_several_engines_share_the_rows(params, config, tokenizer, engine):
    engines = []

    @contextlib.contextmanager
    def opened(on_progress):
        engines.append(Engine(params, config, tokenizer, COMPUTE, batch_size=SLOTS))
        yield engines[-1]

    with Running(tokenizer, opened, slots=SLOTS, engines=2, context=config.sequence_len, stages=("sft",)) as running:
        running.wait_until_ok()
        reply = running.complete([5, 6, 7], n=6, max_tokens=9, seed=3, ignore_eos=True)
        want = engine.generate(
            [[5, 6, 7]], num_samples=6, max_tokens=9, seed=3, ignore_end=True, temperature=0.6, top_k=50
        )
        assert texts_of(reply, 6) == [shown_text(one, tokenizer) for one in want]
        assert [engine._scheduler._next for engine in engines] == [3, 3]  # ids given
        assert running.metric("slots") == 2 * SLOTS


def test_log_probabilities_of_prompts_are_the_scorer_s(serving, engine, params, config):
    """As lm-evaluation-harness asks for them: sums within 1e-4, the same greedy tokens, one token generated."""
    import jax

    from jaxchat.config import Model
    from jaxchat.eval.scoring import Scorer, Span
    from jaxchat.sharding import make_mesh

    random = np.random.default_rng(0)
    prompts = [random.integers(0, 270, length).tolist() for length in (2, 17, 40, 94)]
    greedy = engine.generate([prompts[1]], max_tokens=9, temperature=0.0, ignore_end=True)[0]
    prompts.append([*prompts[1], *greedy.tokens])
    mesh = make_mesh(jax.devices()[:1])
    scorer = Scorer(params, Model(config, Compute(attention="blocks", mesh=mesh)), quiet=True)
    scores = scorer.spans([Span(np.array(prompt, np.int32), 1, len(prompt)) for prompt in prompts])
    reply = serving.complete(prompts, max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234).json
    for prompt, score, choice in zip(prompts, scores, reply["choices"], strict=True):
        found = choice["logprobs"]
        logprobs, tops = found["token_logprobs"][1:-1], found["top_logprobs"][1:-1]
        assert len(logprobs) == len(prompt) - 1
        np.testing.assert_allclose(logprobs, -score.nll, rtol=1e-6, atol=1e-5)  # float32, of logits up to 15
        assert sum(logprobs) == pytest.approx(-float(score.nll.sum()), abs=1e-4)
        greedy = [logprob == max(top.values()) for logprob, top in zip(logprobs, tops, strict=True)]
        assert greedy == score.right.tolist()
    assert scores[-1].right[-9:].all()


def test_openai_python(client):
    model = client.models.list().data[0]
    assert model.id == "toy-sft" == client.models.retrieve("toy-sft").id
    settings = {"model": model.id, "messages": QUESTION, "max_tokens": 12, "seed": 4}
    whole = client.chat.completions.create(**settings, n=4)
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) > 1 and whole.usage.total_tokens > 12
    assert [choice.message.content for choice in client.chat.completions.create(**settings, n=4).choices] == texts
    parts = [""] * 4
    for chunk in client.chat.completions.create(**settings, n=4, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            parts[choice.index] += choice.delta.content or ""
        usage = chunk.usage
    assert parts == texts and usage == whole.usage
    with client.chat.completions.stream(**settings, n=4) as stream:
        assert len([*stream]) > 10
        final = stream.current_completion_snapshot
    assert [choice.message.content for choice in final.choices] == texts
    other = client.chat.completions.create(**settings | {"seed": None})
    again = client.chat.completions.create(**settings | {"seed": other.jaxchat["seed"]})
    assert again.choices[0].message.content == other.choices[0].message.content
    completion = client.completions.create(
        model=model.id, prompt="the", max_tokens=5, logprobs=2, echo=True, temperature=0
    )
    assert completion.choices[0].text.startswith("the") and len(completion.choices[0].logprobs.tokens) > 5


def across_tokens(text: str, entries) -> str:
    """Two characters of an answer that no one of its tokens has both. entries: its log-probabilities."""
    tokens = [bytes(entry.bytes).decode("utf-8", "replace") for entry in entries]
    pairs = map("".join, itertools.pairwise(text))
    return next(pair for pair in pairs if not any(pair in token for token in tokens))


def test_openai_python_stops_across_tokens_and_log_probabilities(client):
    settings = {
        "model": "toy-sft",
        "messages": QUESTION,
        "max_tokens": 30,
        "seed": 4,
        "extra_body": {"ignore_eos": True},
    }
    choice = client.chat.completions.create(**settings, logprobs=True, top_logprobs=2).choices[0]
    text, entries = choice.message.content, choice.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode("utf-8", "replace") == text and len(text) > 9
    stop = across_tokens(text, entries)
    cut = text[: text.index(stop)]
    assert client.chat.completions.create(**settings, stop=[stop]).choices[0].message.content == cut
    streamed = client.chat.completions.create(**settings, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == cut


def test_openai_python_s_errors(client):
    import openai

    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=QUESTION)
    assert missing.value.code == "model_not_found" and missing.value.param == "model" and missing.value.request_id
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="", messages=QUESTION, temperature=7)
    assert wrong.value.param == "temperature" and wrong.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        client.chat.completions.create(
            model="", messages=QUESTION, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="", input="x")


def test_openai_python_tries_again_after_429(serving, client):
    """All slots and places to wait are taken; the client's own retry finds room once they have gone."""
    from serve_helpers import open_request

    busy = [open_request(serving.port, {"n": 16, "stream": True, "ignore_eos": True}) for _ in range(5)]
    until(lambda: len(serving.service.jobs) == 5)
    seen = serving.metric("requests_total", code="429")
    with ThreadPoolExecutor(1) as pool:
        again = client.with_options(max_retries=5)
        answer = pool.submit(again.chat.completions.create, model="", messages=QUESTION, max_tokens=3)
        with contextlib.suppress(AssertionError):  # a machine that is fast enough has room at once
            until(lambda: serving.metric("requests_total", code="429") > seen, 1)
        for one in busy:
            one.close()
        assert answer.result(60).usage.completion_tokens <= 3


@pytest.mark.slow
def test_llm(serving, tmp_path):
    pytest.importorskip("llm", reason="needs the extra dev")

    def said(*args):
        command = [sys.executable, "-m", "llm", "openai", "endpoint", f"{serving.url}/v1", *args]
        env = os.environ | {"LLM_USER_PATH": str(tmp_path)}
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=120).stdout

    assert "toy-sft" in said("--models")
    options = ["-m", "toy-sft", "-o", "seed", "7", "-o", "max_tokens", "9", "the cat"]
    want = serving.chat("the cat", seed=7, max_tokens=9).json["choices"][0]["message"]["content"]
    assert said(*options).rstrip("\n") == want.rstrip("\n") == said("--no-stream", *options).rstrip("\n")


def test_a_real_engine_frees_what_was_left(serving):
    from serve_helpers import open_request

    clients = [open_request(serving.port, {"stream": i % 2 == 0, "n": 4, "ignore_eos": True}) for i in range(6)]
    until(lambda: serving.metric("num_requests_running") > 0 or not serving.service.jobs)
    for client in clients:
        client.close()
    until(lambda: serving.metric("num_requests_running") + serving.metric("num_requests_waiting") == 0)
    until(lambda: not serving.service.jobs)
    assert serving.ask("GET", "/health").status == 200


def test_an_answer_can_be_had_again_by_its_seed(serving):
    first = serving.chat(max_tokens=8).json
    assert serving.chat(max_tokens=8, seed=first["jaxchat"]["seed"]).json["choices"] == first["choices"]
