"""What this backend tells the outside of its envelopes: JSON lines and Prometheus metrics."""

import logging
import logging.handlers

import msgspec

from execution_envelope.telemetry.log import KEYS, LogObserver
from execution_envelope.telemetry.prometheus import PrometheusObserver
from proving_ground.settings import Settings

_LOGGER = "proving_ground.envelopes"


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"level": record.levelname.lower(), "event": record.getMessage()}
        line |= {key: value for key in KEYS if (value := getattr(record, key, None)) is not None}
        return msgspec.json.encode(line).decode()


def observers(settings: Settings) -> tuple[LogObserver, PrometheusObserver]:
    """The log as the settings say, and the counters behind `/metrics`."""
    handler: logging.Handler = logging.StreamHandler()
    if settings.log is not None:
        # Several processes append to it, `envelope approve` too, and each finds the new file when it is rotated.
        handler = logging.handlers.WatchedFileHandler(settings.log, delay=True)
    handler.setFormatter(_JsonLines())
    logger = logging.getLogger(_LOGGER)
    for before in list(logger.handlers):
        logger.removeHandler(before)
        before.close()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return LogObserver(logger), PrometheusObserver()
