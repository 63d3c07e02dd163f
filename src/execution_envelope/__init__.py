"""execution-envelope: the open admission contract for AI backends.

One sealed record of who asked for what, under which scope, what policy said, and what the backend really gave.
"""

from execution_envelope.admission import Admission
from execution_envelope.controller import AdmissionController
from execution_envelope.decision import Decider, Decision, Declaration, Duty, Observation, Observer, Rule
from execution_envelope.envelope import Ask, Envelope, Subject, Target, established
from execution_envelope.errors import (
    Denied,
    EnvelopeError,
    Held,
    IllegalTransition,
    InvalidAsk,
    InvalidField,
    KeyConflict,
    LedgerUnavailable,
    NotFound,
    NotHeld,
    NotLive,
    OpenChildren,
    OpenObligations,
    ReadOnly,
    ReferenceTaken,
    Refused,
    SelfApproval,
    Unidentified,
    Violation,
)
from execution_envelope.grant import Grant
from execution_envelope.lifecycle import Candidate
from execution_envelope.reconciliation import Liveness
from execution_envelope.record import Record
from execution_envelope.resources import per_device, per_replica, total
from execution_envelope.tree import Tree
from execution_envelope.version import __version__

__all__ = [
    "Admission",
    "AdmissionController",
    "Ask",
    "Candidate",
    "Decider",
    "Decision",
    "Declaration",
    "Denied",
    "Duty",
    "Envelope",
    "EnvelopeError",
    "Grant",
    "Held",
    "IllegalTransition",
    "InvalidAsk",
    "InvalidField",
    "KeyConflict",
    "LedgerUnavailable",
    "Liveness",
    "NotFound",
    "NotHeld",
    "NotLive",
    "Observation",
    "Observer",
    "OpenChildren",
    "OpenObligations",
    "ReadOnly",
    "Record",
    "ReferenceTaken",
    "Refused",
    "Rule",
    "SelfApproval",
    "Subject",
    "Target",
    "Tree",
    "Unidentified",
    "Violation",
    "__version__",
    "established",
    "per_device",
    "per_replica",
    "total",
]
