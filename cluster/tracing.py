"""OpenTelemetry traces of tasks: one for each, a span for each stage, told when the task is closed.

A trace's id is the first 32 digits of the task's commitment, so that whoever has the one finds the
other. Everything comes from the record: nothing is measured twice, and a task that several
coordinators had a hand in has one trace. Off, nothing of OpenTelemetry is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from cluster.core.errors import ConfigError
from cluster.core.record import TaskRecord
from cluster.core.types import Commitment
from cluster.stages import spans

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

FLUSH_SECONDS = 2.0


class Traces(Protocol):
    def closed(self, record: TaskRecord) -> None:
        """Tell of a task that is closed; it never blocks."""
        ...

    def flush(self) -> None:
        """Send what waits, in `FLUSH_SECONDS` or never."""
        ...


class NoTraces:
    """Free."""

    def closed(self, record: TaskRecord) -> None:
        pass

    def flush(self) -> None:
        pass


def make_traces(endpoint: str | None, version: str, exporter: SpanExporter | None = None) -> Traces:
    """Traces to an OTLP/HTTP endpoint (or an exporter), sent in batches by a thread; one that is
    away costs traces, and nothing else. None where there is no endpoint. Raises `ConfigError` where
    what it needs isn't installed."""
    if endpoint is None:
        return NoTraces()
    try:
        from opentelemetry import trace
        from opentelemetry.context import Context
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
    except ImportError:
        raise ConfigError(
            "tracing.endpoint: OpenTelemetry's exporter is not installed: "
            "pip install 'crynux-cluster[tracing]'"
        ) from None

    class ByCommitment(RandomIdGenerator):
        task = Commitment("")

        def generate_trace_id(self) -> int:
            return int(self.task[2:34], 16) or super().generate_trace_id()

    ids = ByCommitment()
    resource = Resource.create({"service.name": "crynux-cluster", "service.version": version})
    provider = TracerProvider(resource=resource, id_generator=ids, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter(endpoint)))
    tracer = provider.get_tracer("crynux-cluster", version)

    class OtlpTraces:
        def closed(self, record: TaskRecord) -> None:
            ids.task = record.commitment
            took = spans(record)
            begins = min([record.seen_at, *(since for _, since, _ in took)])
            root = tracer.start_span(
                "task", Context(), start_time=_nanos(begins), attributes=_facts(record)
            )
            if record.fault is not None or record.payment == 0:
                root.set_status(trace.StatusCode.ERROR, record.fault or "not paid")
            within = trace.set_span_in_context(root)
            for stage, since, until in took:
                span = tracer.start_span(stage, within, start_time=_nanos(since))
                span.end(_nanos(max(since, until)))
            ends = [record.closed_at or record.seen_at, *(until for _, _, until in took)]
            root.end(_nanos(max(ends)))

        def flush(self) -> None:
            provider.force_flush(int(FLUSH_SECONDS * 1000))

    return OtlpTraces()


def _facts(record: TaskRecord) -> dict[str, str | int]:
    """No prompt, no parameters."""
    last = record.attempts[-1] if record.attempts else None
    facts = {
        "crynux.task": record.commitment,
        "crynux.account": record.account,
        "crynux.type": record.task_type.name,
        "crynux.outcome": "" if record.outcome is None else record.outcome.value,
        "crynux.gpu": "" if last is None else last.gpu_id,
        "crynux.attempt": "" if last is None else last.attempt_id,
        "crynux.models": ",".join(record.model_ids),
    }
    return {**facts, "crynux.attempts": len(record.attempts)}


def _nanos(seconds: float) -> int:
    return int(seconds * 1e9)
