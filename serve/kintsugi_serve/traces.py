"""Traces of requests, on top of Ray Serve's own: where spans go, and what a replica did within one.

Ray Serve makes spans for its proxy, the ingress and the replica if RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH names
`kintsugi_serve.traces:exporters` on every node; KINTSUGI_TRACES says where they go.
"""

import os
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from opentelemetry import trace
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor, SpanProcessor

from kintsugi.errors import ConfigError

STAGES = ("decode", "queue", "model", "encode")
_tracer = trace.get_tracer("kintsugi")


def exporters() -> list[SpanProcessor]:
    """What Ray Serve asks each of its processes for.

    `KINTSUGI_TRACES` is `file:FOLDER`, which gets a file of JSON lines for each process, or the http(s) address of an
    OpenTelemetry collector, such as http://127.0.0.1:4318/v1/traces.

    Raises:
        ConfigError: it is something else, or what speaks to a collector is not installed.
    """
    target = os.environ.get("KINTSUGI_TRACES", "")
    if target.startswith("file:"):
        folder = Path(target.removeprefix("file:"))
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Open as long as the process lives.
        stream = (folder / f"{os.getpid()}-{time.time_ns()}.jsonl").open("a")
        out = ConsoleSpanExporter(out=stream, formatter=lambda span: span.to_json(indent=None) + "\n")
        return [SimpleSpanProcessor(out)]
    if target.startswith(("http://", "https://")):
        try:
            # Not a dependency: most have no collector.
            otlp = import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
        except ImportError as error:
            raise ConfigError(
                "KINTSUGI_TRACES names a collector: install opentelemetry-exporter-otlp-proto-http on every node"
            ) from error
        return [BatchSpanProcessor(otlp.OTLPSpanExporter(endpoint=target))]
    raise ConfigError(f"KINTSUGI_TRACES must be file:FOLDER or the http address of a collector (got '{target}')")


def tell_stages(timing_ms: Mapping[str, float]) -> None:
    """Spans of the stages that ended just now, one after another, within the span of the request."""
    if not trace.get_current_span().is_recording():
        return
    at = time.time_ns() - sum(round(timing_ms[stage] * 1e6) for stage in STAGES)
    for stage in STAGES:
        span = _tracer.start_span(stage, start_time=at)
        at += round(timing_ms[stage] * 1e6)
        span.end(at)
