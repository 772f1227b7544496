"""Prometheus metrics of the server. Most have vLLM's names, with the prefix jaxchat_ instead of vllm:."""

from importlib.metadata import version

import jax
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5, 10, 20, 40, 80, 160, 320)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


class Metrics:
    """All metrics of the server, in a separate Prometheus registry."""

    def __init__(self):
        self.registry = CollectorRegistry()
        model = ("model_name",)

        def counter(name, text, *labels):
            return Counter(f"jaxchat_{name}", text, labels, registry=self.registry)

        def seconds(name, text):
            return Histogram(f"jaxchat_{name}_seconds", text, model, buckets=SECONDS, registry=self.registry)

        def sizes(name, text):
            return Histogram(f"jaxchat_{name}", text, model, buckets=TOKENS, registry=self.registry)

        self.requests = counter("requests", "HTTP requests answered", "endpoint", "code")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of finished answers", *model)
        self.generation_tokens = counter("generation_tokens", "Tokens sampled for finished answers", *model)
        self.forced_tokens = counter("forced_tokens", "Tokens inserted by the calculator", *model)
        self.success = counter("request_success", "Finished answers, by reason", *model, "finished_reason")
        self.tool_calls = counter("tool_calls", "Calculator calls, by result", *model, "result")
        self.request_prompt = sizes("request_prompt_tokens", "Number of tokens in a prompt")
        self.request_generation = sizes("request_generation_tokens", "Number of tokens sampled for an answer")
        self.first = seconds("time_to_first_token", "Time from a request to its first token")
        self.between = seconds("inter_token_latency", "Time between two tokens of an answer")
        self.whole = seconds("e2e_request_latency", "Time from a request to its last token")
        self.queue = seconds("request_queue_time", "Time from a request to the start of prefill")
        self.prefill = seconds("request_prefill_time", "Time from the start of prefill to the first token")
        self.decode = seconds("request_decode_time", "Time from the first token to the last")
        about = Gauge("jaxchat_build_info", "The version of jaxchat", ("version",), registry=self.registry)
        about.labels(version("jaxchat")).set(1)

    def watch(self, pools: dict):
        """Report the current state of `pools`, {model name: Pool}, whenever the metrics are read."""
        self.registry.register(_State(pools))

    def tokens(self, model: str, row, count: int, now: float):
        """Record the latency of `count` new tokens of a Row, received at `now` (seconds of loop.clock).

        Call this before row.first and row.last are updated.
        """
        if not row.first:
            self.first.labels(model).observe(now - row.asked)
            return
        between = self.between.labels(model)
        for _ in range(count):
            between.observe((now - row.last) / count)

    def ended(self, model: str, row, answer):
        """Record the token counts, tool calls and times of a finished answer. row: the answer's Row."""
        self.success.labels(model, answer.finish).inc()
        self.prompt_tokens.labels(model).inc(len(answer.prompt))
        self.generation_tokens.labels(model).inc(answer.sampled)
        self.forced_tokens.labels(model).inc(answer.forced)
        self.request_prompt.labels(model).observe(len(answer.prompt))
        self.request_generation.labels(model).observe(answer.sampled)
        for tool in answer.tools:
            result = "made_up" if tool.get("made_up") else "value" if "output" in tool else "none"
            self.tool_calls.labels(model, result).inc()
        first = row.first or row.last
        self.whole.labels(model).observe(row.last - row.asked)
        self.queue.labels(model).observe(row.began - row.asked)
        self.prefill.labels(model).observe(first - row.began)
        self.decode.labels(model).observe(row.last - first)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _State:
    """Prometheus collector of current values: running and waiting answers, and cache and memory in use."""

    def __init__(self, pools: dict):
        self._pools = pools

    def collect(self):
        texts = {
            "num_requests_running": "Answers that have a slot",
            "num_requests_waiting": "Answers that wait for a slot",
            "slots": "Answers that can be generated at a time",
            "cache_usage_ratio": "Fraction of the cache's positions in use",
        }
        about = [(f"jaxchat_{name}", text) for name, text in texts.items()]
        families = [GaugeMetricFamily(*each, labels=["model_name"]) for each in about]
        for model, pool in self._pools.items():
            running = [row for row in pool.live if row.began]
            filled = sum(len(row.request.prompt) + row.num_tokens for row in running)
            values = (len(running), len(pool.live) - len(running), pool.slots, filled / pool.positions)
            for family, value in zip(families, values, strict=True):
                family.add_metric([model], value)
        yield from families
        memory = GaugeMetricFamily("jaxchat_device_memory_bytes", "Device memory in use", labels=["device"])
        for device in jax.local_devices():
            if used := (device.memory_stats() or {}).get("bytes_in_use"):  # CPUs report none
                memory.add_metric([str(device.id)], used)
        yield memory
