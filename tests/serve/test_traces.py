import itertools
import json
import sys
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider

from kintsugi.errors import ConfigError
from kintsugi_serve import traces


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> TracerProvider:
    """As Ray Serve sets one up in each of its processes."""
    provider = TracerProvider()
    monkeypatch.setattr(traces, "_tracer", provider.get_tracer("kintsugi"))
    return provider


def _use(provider: TracerProvider) -> None:
    for processor in traces.exporters():
        provider.add_span_processor(processor)


def test_a_request_has_its_stages_one_after_another_within_its_span(
    provider: TracerProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KINTSUGI_TRACES", f"file:{tmp_path / 'spans'}")
    _use(provider)
    with provider.get_tracer("ray").start_as_current_span("request"):
        traces.tell_stages({"decode": 1.0, "queue": 0.5, "model": 20.0, "encode": 2.0})
    (file,) = (tmp_path / "spans").iterdir()
    *stages, request = [json.loads(line) for line in file.read_text().splitlines()]
    assert [span["name"] for span in stages] == ["decode", "queue", "model", "encode"]
    assert {span["parent_id"] for span in stages} == {request["context"]["span_id"]}
    for before, after in itertools.pairwise(stages):
        assert before["end_time"] == after["start_time"]


def test_without_a_trace_there_are_no_spans(
    provider: TracerProvider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KINTSUGI_TRACES", f"file:{tmp_path}")
    _use(provider)
    traces.tell_stages({"decode": 1.0, "queue": 0.5, "model": 20.0, "encode": 2.0})
    assert [file.read_text() for file in tmp_path.iterdir()] == [""]


@pytest.mark.parametrize("target", ["", "/tmp/traces", "grpc://collector:4317"])
def test_an_address_that_is_none_is_refused(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINTSUGI_TRACES", target)
    with pytest.raises(ConfigError, match="must be file:FOLDER or the http address"):
        traces.exporters()


def test_a_collector_without_what_speaks_to_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINTSUGI_TRACES", "http://127.0.0.1:4318/v1/traces")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match="opentelemetry-exporter-otlp-proto-http"):
        traces.exporters()
