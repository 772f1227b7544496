"""launch.serve as a user calls it, on a small model: addresses, signals, one-line errors."""

import contextlib
import http.client
import json
import signal

import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")

from conftest import random_params  # noqa: E402
from serve_helpers import save_models, serve_command  # noqa: E402

from jaxchat.config import Compute, ModelConfig  # noqa: E402
from jaxchat.infer import decode  # noqa: E402
from jaxchat.infer.engine import Engine  # noqa: E402
from jaxchat.serve import guard  # noqa: E402
from launch import serve  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base directory with a base and an SFT model."""
    home = tmp_path_factory.mktemp("served")
    save_models(home, "base", "sft")
    return home


@contextlib.contextmanager
def asked(port: int, method: str, path: str, body=None):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request(method, path, None if body is None else json.dumps(body))
        yield connection.getresponse()


def ask(*args) -> dict:
    with asked(*args) as response:
        return json.load(response)


@pytest.mark.slow
def test_two_stages_on_two_devices_until_sigterm(folder):
    with serve_command(folder, "--source=sft,base", devices=2) as (process, port):
        models = ask(port, "GET", "/v1/models")["data"]
        assert [model["id"] for model in models] == ["d1-sft", "d1-base"]
        assert {model["jaxchat"]["slots"] for model in models} == {4}
        texts = []
        for model in models:
            body = {"model": model["id"], "messages": [{"role": "user", "content": "hi"}], "n": 4, "seed": 1}
            found = ask(port, "POST", "/v1/chat/completions", body | {"max_tokens": 8})
            texts.append([choice["message"]["content"] for choice in found["choices"]])
        assert texts[0] != texts[1] and len(set(texts[0])) > 1
        body |= {"stream": True, "ignore_eos": True, "max_tokens": 40}
        with contextlib.ExitStack() as stack:
            streams = [stack.enter_context(asked(port, "POST", "/v1/chat/completions", body)) for _ in range(50)]
            process.send_signal(signal.SIGTERM)
            for stream in streams:
                text = stream.read()
                assert text.endswith(b"data: [DONE]\n\n")
                assert text.count(b'"finish_reason":"length"') == 4 or b'{"error"' in text
        assert process.wait(60) == 0 and process.stdout.read().endswith("stopped\n")


def refusal(folder, monkeypatch, capsys, *args) -> str:
    """The one line that the command answers with."""
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(folder))
    with pytest.raises(SystemExit) as stop:
        serve.main([*args])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def test_stages_are_listed_with_or_without_spaces():
    assert serve.stages_of(serve.Config(source="base, sft")) == ["base", "sft"]


def test_what_cannot_be_served_is_one_line(folder, monkeypatch, capsys, tmp_path):
    def refused(*args):
        return refusal(folder, monkeypatch, capsys, *args)

    assert "base, mid, sft" in refused("--source=best")
    assert "each once" in refused("--source=sft,sft")
    assert "no mid checkpoint" in refused("--source=mid")
    assert "a single stage" in refused("--source=sft,base", "--step=3")
    assert "--slots=0" in refused("--slots=0") and "--port=70000" in refused("--port=70000")
    with serve_socket() as port:
        assert refused(f"--port={port}").count("ddress already in use") == 1
    for origin in ("https://a.example/", "a.example", "null", "https://a.example:x"):
        assert f"'{origin}' is not an origin" in refused(f"--cors_origins=https://b.example, {origin}")
    assert "no sft checkpoint" in refusal(tmp_path, monkeypatch, capsys)


@contextlib.contextmanager
def serve_socket():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock.getsockname()[1]


def test_without_the_extra_it_says_what_to_install(folder, monkeypatch, capsys):
    monkeypatch.setattr(serve, "LIBRARIES", ("json", "no_such_library"))
    line = refusal(folder, monkeypatch, capsys)
    assert "needs no_such_library" in line and "EXTRAS=serve" in line


def test_addresses_and_keys(monkeypatch):
    assert [guard.is_local(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "box")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip
    monkeypatch.setenv("JAXCHAT_API_KEY", "a, b")
    assert serve.keys_of(serve.Config()) == ("a", "b") and serve.keys_of(serve.Config(api_key="c")) == ("c",)
    assert serve.address_of("::1", 80) == "http://[::1]:80" == serve.address_of("::", 80)
    assert serve.address_of("0.0.0.0", 80) == "http://127.0.0.1:80"
    origins = serve.Config(cors_origins=" https://A.example , http://[::1]:8080,")
    assert serve.origins_of(origins) == ("https://a.example", "http://[::1]:8080")


@pytest.mark.slow
def test_all_shapes_are_compiled_ahead(tokenizer):
    """Whatever is asked for afterwards compiles nothing, so that no other stream waits."""
    config = ModelConfig(32, tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=1, n_embd=32)
    engine = Engine(
        random_params(config, 0, scale=0.4), config, tokenizer, Compute.for_backend(), batch_size=2, few_shapes=True
    )
    serve.compile_shapes(engine, 32, lambda *done: None)
    programs = (decode.read_prompts, decode.decode, decode.empty_state, decode.resize)
    before = [program._cache_size() for program in programs]
    for prompt in ([1], [1] * 20, [1] * 32):
        for settings in ({"temperature": 0.0}, {}, {"top_p": 0.5}, {"min_tokens": 2}):
            for more in ({}, {"logprobs": 0}, {"logprobs": 5, "prompt_logprobs": True}, {"logprobs": 20}):
                engine.generate([prompt] * 2, max_tokens=2, **settings, **more)
    assert [program._cache_size() for program in programs] == before


def test_a_host_for_all_without_a_key_warns(folder, monkeypatch, capsys):
    async def nothing(*args):
        args[-1].close()  # the socket

    monkeypatch.setattr(serve, "serve", nothing)
    monkeypatch.setenv("JAXCHAT_BASE_DIR", str(folder))
    for args, warns in (["--host=0.0.0.0"], True), (["--host=0.0.0.0", "--api_key=x"], False), ([], False):
        serve.main(["--port=0", *args])
        said = capsys.readouterr()
        assert ("warning: everybody who reaches 0.0.0.0" in said.err) == warns
        assert ("listens on all addresses" in said.out) == (args != [])
        assert "Serve d1-sft" in said.out and "slots    8 a device" in said.out
