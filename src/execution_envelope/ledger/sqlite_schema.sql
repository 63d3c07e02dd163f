-- The ledger on SQLite. The log (envelopes, events, keys, closings) only grows; triggers refuse the rest.
CREATE TABLE ledger_schema (version INTEGER NOT NULL);
INSERT INTO ledger_schema VALUES (1);

CREATE TABLE envelopes (
    id     TEXT PRIMARY KEY NOT NULL,
    body   BLOB NOT NULL,
    digest TEXT NOT NULL,
    parent TEXT
);
CREATE INDEX envelopes_by_parent ON envelopes (parent) WHERE parent IS NOT NULL;

CREATE TABLE events (
    cursor   INTEGER PRIMARY KEY AUTOINCREMENT,
    chain    TEXT NOT NULL,
    position INTEGER NOT NULL,
    envelope TEXT,
    sequence INTEGER,
    type     TEXT NOT NULL,
    body     BLOB NOT NULL,
    hash     BLOB NOT NULL,
    UNIQUE (chain, position),
    UNIQUE (envelope, sequence)
);

-- One end for each envelope, and one envelope for each idempotency key: guarded by primary keys.
CREATE TABLE closings (envelope TEXT PRIMARY KEY NOT NULL) WITHOUT ROWID;
CREATE TABLE keys (
    digest   TEXT PRIMARY KEY NOT NULL,
    request  TEXT NOT NULL,
    envelope TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE bindings (
    ordinal   INTEGER PRIMARY KEY AUTOINCREMENT,
    kind      TEXT NOT NULL,
    reference TEXT NOT NULL,
    envelope  TEXT NOT NULL,
    UNIQUE (kind, reference, envelope)
);

-- Not part of the log: bounded, and the oldest go first.
CREATE TABLE attempted_requests (
    ordinal    INTEGER PRIMARY KEY AUTOINCREMENT,
    at         TEXT NOT NULL,
    surface    TEXT NOT NULL,
    reason     TEXT NOT NULL,
    status     INTEGER NOT NULL,
    detail     TEXT NOT NULL,
    request_id TEXT,
    dropped    INTEGER NOT NULL
);

CREATE TRIGGER envelopes_keep BEFORE UPDATE ON envelopes BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER envelopes_stay BEFORE DELETE ON envelopes BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER events_keep BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER events_stay BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER closings_keep BEFORE UPDATE ON closings BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER closings_stay BEFORE DELETE ON closings BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER keys_keep BEFORE UPDATE ON keys BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER keys_stay BEFORE DELETE ON keys BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER bindings_keep BEFORE UPDATE ON bindings BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER bindings_stay BEFORE DELETE ON bindings BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
