"""What leaves the ledger for others to see: log lines, spans and metrics, events.

`log` needs no package. `otel` needs the extra `otel`, `prometheus` the extra `prometheus`, `cloudevents` and what sends
them the extra `cloudevents`, to NATS the extra `nats`. Each module is imported by its own name.
"""
