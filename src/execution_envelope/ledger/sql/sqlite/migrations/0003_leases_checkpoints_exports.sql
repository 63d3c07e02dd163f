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

UPDATE ledger_schema SET version = 3;
