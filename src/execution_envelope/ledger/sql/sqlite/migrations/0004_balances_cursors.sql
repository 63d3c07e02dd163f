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

UPDATE ledger_schema SET version = 4;
