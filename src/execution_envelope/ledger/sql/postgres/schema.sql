-- The ledger on PostgreSQL, version 4. The log (all but the last tables) only grows; triggers refuse the rest.
CREATE TABLE ledger_schema (version integer NOT NULL);
INSERT INTO ledger_schema VALUES (4);

-- A segment is a partition of its own, for chains from number * 1000000 on.
CREATE TABLE segments (number integer PRIMARY KEY);
INSERT INTO segments VALUES (1);

CREATE TABLE chains (
    number bigint PRIMARY KEY,
    id     text COLLATE "C" NOT NULL UNIQUE
);

CREATE TABLE events (
    chain    bigint NOT NULL,
    position bigint NOT NULL,
    body     bytea NOT NULL,
    hash     bytea NOT NULL,
    sealed   bytea,
    PRIMARY KEY (chain, position)
) PARTITION BY RANGE (chain);
CREATE TABLE events_1 PARTITION OF events FOR VALUES FROM (1000000) TO (2000000);

-- The order of each envelope's events, and where they are. Not in segments: its key makes a sequence unique everywhere.
CREATE TABLE places (
    envelope text COLLATE "C" NOT NULL,
    sequence integer NOT NULL,
    type     text COLLATE "C" NOT NULL,
    chain    bigint NOT NULL,
    position bigint NOT NULL,
    PRIMARY KEY (envelope, sequence)
);

-- One end for each envelope, and one envelope for each idempotency key.
CREATE TABLE closings (envelope text COLLATE "C" PRIMARY KEY);
CREATE TABLE keys (
    digest   text COLLATE "C" PRIMARY KEY,
    request  text COLLATE "C" NOT NULL,
    envelope text COLLATE "C" NOT NULL
);

-- Two that bind one reference at the same time take the same ordinal: one of them is refused.
CREATE TABLE bindings (
    kind      text COLLATE "C" NOT NULL,
    reference text COLLATE "C" NOT NULL,
    ordinal   integer NOT NULL,
    envelope  text COLLATE "C" NOT NULL,
    PRIMARY KEY (kind, reference, ordinal)
);
CREATE TABLE children (
    parent   text COLLATE "C" NOT NULL,
    envelope text COLLATE "C" NOT NULL,
    PRIMARY KEY (parent, envelope)
);

CREATE FUNCTION ledger_only_grows() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the ledger only grows' USING ERRCODE = 'restrict_violation';
END
$$;
-- Partitions take over the triggers of rows by themselves, those of TRUNCATE they do not.
CREATE TRIGGER segments_keep BEFORE UPDATE OR DELETE ON segments FOR EACH ROW EXECUTE FUNCTION ledger_only_grows();
CREATE TRIGGER segments_stay BEFORE TRUNCATE ON segments FOR EACH STATEMENT EXECUTE FUNCTION ledger_only_grows();
CREATE TRIGGER chains_keep BEFORE UPDATE OR DELETE ON chains FOR EACH ROW EXECUTE FUNCTION ledger_only_grows();
CREATE TRIGGER chains_stay BEFORE TRUNCATE ON chains FOR EACH STATEMENT EXECUTE FUNCTION ledger_only_grows();
CREATE TRIGGER events_keep BEFORE UPDATE OR DELETE ON events FOR EACH ROW EXECUTE FUNCTION ledger_only_grows();
CREATE TRIGGER events_stay BEFORE TRUNCATE ON events FOR EACH STATEMENT EXECUTE FUNCTION ledger_only_grows();
CREATE TRIGGER events_1_stay BEFORE TRUNCATE ON events_1 FOR EACH STATEMENT EXECUTE FUNCTION ledger_only_grows();
CREATE TRIGGER places_keep BEFORE UPDATE OR DELETE ON places FOR EACH ROW EXECUTE FUNCTION ledger_only_grows();
CREATE TRIGGER places_stay BEFORE TRUNCATE ON places FOR EACH STATEMENT EXECUTE FUNCTION ledger_only_grows();
CREATE TRIGGER closings_keep BEFORE UPDATE OR DELETE ON closings FOR EACH ROW EXECUTE FUNCTION ledger_only_grows();
CREATE TRIGGER closings_stay BEFORE TRUNCATE ON closings FOR EACH STATEMENT EXECUTE FUNCTION ledger_only_grows();
CREATE TRIGGER keys_keep BEFORE UPDATE OR DELETE ON keys FOR EACH ROW EXECUTE FUNCTION ledger_only_grows();
CREATE TRIGGER keys_stay BEFORE TRUNCATE ON keys FOR EACH STATEMENT EXECUTE FUNCTION ledger_only_grows();
CREATE TRIGGER bindings_keep BEFORE UPDATE OR DELETE ON bindings FOR EACH ROW EXECUTE FUNCTION ledger_only_grows();
CREATE TRIGGER bindings_stay BEFORE TRUNCATE ON bindings FOR EACH STATEMENT EXECUTE FUNCTION ledger_only_grows();
CREATE TRIGGER children_keep BEFORE UPDATE OR DELETE ON children FOR EACH ROW EXECUTE FUNCTION ledger_only_grows();
CREATE TRIGGER children_stay BEFORE TRUNCATE ON children FOR EACH STATEMENT EXECUTE FUNCTION ledger_only_grows();

-- Beside the log: bounded, and the oldest go first.
CREATE TABLE attempted_requests (
    ordinal    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at         text NOT NULL,
    surface    text NOT NULL,
    reason     text NOT NULL,
    status     integer NOT NULL,
    detail     text NOT NULL,
    request_id text,
    dropped    integer NOT NULL
);

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

-- Beside the log, since version 4: what stands in the accounts of budgets, in base units, and which executions hold it;
-- the one currency that costs are in; how far consumers of the log have come. State, which follows from the log.
CREATE TABLE balances (
    account  text COLLATE "C" NOT NULL,
    period   text COLLATE "C" NOT NULL,
    resource text COLLATE "C" NOT NULL,
    quota    bigint NOT NULL,
    reserved bigint NOT NULL,
    spent    bigint NOT NULL,
    unknown  bigint NOT NULL,
    PRIMARY KEY (account, period, resource)
);
CREATE TABLE holdings (
    account  text COLLATE "C" NOT NULL,
    period   text COLLATE "C" NOT NULL,
    resource text COLLATE "C" NOT NULL,
    envelope text COLLATE "C" NOT NULL,
    reserved bigint NOT NULL,
    PRIMARY KEY (account, period, resource, envelope)
);
CREATE TABLE currency (
    one  integer PRIMARY KEY CHECK (one = 1),
    code text NOT NULL
);
CREATE TABLE cursors (
    consumer text COLLATE "C" NOT NULL,
    chain    text COLLATE "C" NOT NULL,
    position bigint NOT NULL,
    PRIMARY KEY (consumer, chain)
);
