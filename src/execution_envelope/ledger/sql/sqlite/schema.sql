-- The ledger on SQLite, version 4. The log (all but the last tables) only grows; triggers refuse the rest.
CREATE TABLE ledger_schema (version INTEGER NOT NULL);
INSERT INTO ledger_schema VALUES (4);

-- A segment is a table of its own, for chains from number * 1000000 on.
CREATE TABLE segments (number INTEGER PRIMARY KEY);
INSERT INTO segments VALUES (1);

CREATE TABLE chains (
    number INTEGER PRIMARY KEY,
    id     TEXT NOT NULL UNIQUE
);

-- place = number of the chain << 32 | position.
CREATE TABLE events_1 (
    place  INTEGER PRIMARY KEY,
    body   BLOB NOT NULL,
    hash   BLOB NOT NULL,
    sealed BLOB
);
CREATE VIEW events AS SELECT place, body, hash, sealed FROM events_1;

-- The order of each envelope's events, and where they are.
CREATE TABLE places (
    envelope TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    type     TEXT NOT NULL,
    place    INTEGER NOT NULL,
    PRIMARY KEY (envelope, sequence)
) WITHOUT ROWID;

-- One end for each envelope, and one envelope for each idempotency key.
CREATE TABLE closings (envelope TEXT PRIMARY KEY NOT NULL) WITHOUT ROWID;
CREATE TABLE keys (
    digest   TEXT PRIMARY KEY NOT NULL,
    request  TEXT NOT NULL,
    envelope TEXT NOT NULL
) WITHOUT ROWID;

CREATE TABLE bindings (
    kind      TEXT NOT NULL,
    reference TEXT NOT NULL,
    ordinal   INTEGER NOT NULL,
    envelope  TEXT NOT NULL,
    PRIMARY KEY (kind, reference, ordinal)
) WITHOUT ROWID;
CREATE TABLE children (
    parent   TEXT NOT NULL,
    envelope TEXT NOT NULL,
    PRIMARY KEY (parent, envelope)
) WITHOUT ROWID;

CREATE TRIGGER segments_keep BEFORE UPDATE ON segments BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER segments_stay BEFORE DELETE ON segments BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER chains_keep BEFORE UPDATE ON chains BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER chains_stay BEFORE DELETE ON chains BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER events_1_keep BEFORE UPDATE ON events_1 BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER events_1_stay BEFORE DELETE ON events_1 BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER places_keep BEFORE UPDATE ON places BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER places_stay BEFORE DELETE ON places BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER closings_keep BEFORE UPDATE ON closings BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER closings_stay BEFORE DELETE ON closings BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER keys_keep BEFORE UPDATE ON keys BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER keys_stay BEFORE DELETE ON keys BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER bindings_keep BEFORE UPDATE ON bindings BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER bindings_stay BEFORE DELETE ON bindings BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER children_keep BEFORE UPDATE ON children BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER children_stay BEFORE DELETE ON children BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;

-- Beside the log: bounded, and the oldest go first.
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

-- Beside the log, since version 3: how often the process of a chain said that it still lives; copies of checkpoints; of
-- each segment that was dropped, the manifest of its export and the checkpoint that it was dropped against.
CREATE TABLE leases (
    chain    INTEGER PRIMARY KEY,
    renewals INTEGER NOT NULL
);
CREATE TABLE checkpoints (
    number INTEGER PRIMARY KEY,
    body   BLOB NOT NULL
);
CREATE TRIGGER checkpoints_keep BEFORE UPDATE ON checkpoints BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER checkpoints_stay BEFORE DELETE ON checkpoints BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TABLE exports (
    segment    INTEGER PRIMARY KEY,
    body       BLOB NOT NULL,
    checkpoint INTEGER NOT NULL
);
CREATE TRIGGER exports_keep BEFORE UPDATE ON exports BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;
CREATE TRIGGER exports_stay BEFORE DELETE ON exports BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END;

-- Beside the log, since version 4: what stands in the accounts of budgets, in base units, and which executions hold it;
-- the one currency that costs are in; how far consumers of the log have come. State, which follows from the log.
CREATE TABLE balances (
    account  TEXT NOT NULL,
    period   TEXT NOT NULL,
    resource TEXT NOT NULL,
    quota    INTEGER NOT NULL,
    reserved INTEGER NOT NULL,
    spent    INTEGER NOT NULL,
    unknown  INTEGER NOT NULL,
    PRIMARY KEY (account, period, resource)
) WITHOUT ROWID;
CREATE TABLE holdings (
    account  TEXT NOT NULL,
    period   TEXT NOT NULL,
    resource TEXT NOT NULL,
    envelope TEXT NOT NULL,
    reserved INTEGER NOT NULL,
    PRIMARY KEY (account, period, resource, envelope)
) WITHOUT ROWID;
CREATE TABLE currency (
    one  INTEGER PRIMARY KEY CHECK (one = 1),
    code TEXT NOT NULL
);
CREATE TABLE cursors (
    consumer TEXT NOT NULL,
    chain    TEXT NOT NULL,
    position INTEGER NOT NULL,
    PRIMARY KEY (consumer, chain)
) WITHOUT ROWID;
