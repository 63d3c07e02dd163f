-- Beside the log, since version 3: how often the process of a chain said that it still lives; copies of checkpoints; of
-- each segment that was dropped, the manifest of its export and the checkpoint that it was dropped against.
CREATE TABLE leases (
    chain    bigint PRIMARY KEY,
    renewals bigint NOT NULL
);
CREATE TABLE checkpoints (
    number bigint PRIMARY KEY,
    body   bytea NOT NULL
);
CREATE TRIGGER checkpoints_keep BEFORE UPDATE OR DELETE ON checkpoints FOR EACH ROW EXECUTE FUNCTION ledger_only_grows();
CREATE TRIGGER checkpoints_stay BEFORE TRUNCATE ON checkpoints FOR EACH STATEMENT EXECUTE FUNCTION ledger_only_grows();
CREATE TABLE exports (
    segment    integer PRIMARY KEY,
    body       bytea NOT NULL,
    checkpoint bigint NOT NULL
);
CREATE TRIGGER exports_keep BEFORE UPDATE OR DELETE ON exports FOR EACH ROW EXECUTE FUNCTION ledger_only_grows();
CREATE TRIGGER exports_stay BEFORE TRUNCATE ON exports FOR EACH STATEMENT EXECUTE FUNCTION ledger_only_grows();

UPDATE ledger_schema SET version = 3;
