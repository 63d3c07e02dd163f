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

UPDATE ledger_schema SET version = 4;
