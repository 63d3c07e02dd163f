-- A projection on SQLite, in a file of its own: derived from the log, and of one version only.
-- The epoch tells one making of the tables from another, the generation one state of them from the next.
CREATE TABLE projection_state (
    version    INTEGER NOT NULL,
    epoch      TEXT NOT NULL,
    generation INTEGER NOT NULL
);

-- How far each chain was taken in; `ended` when nothing can follow, `unreadable` counts entries and gaps.
CREATE TABLE projection_positions (
    chain      INTEGER PRIMARY KEY,
    id         TEXT NOT NULL,
    position   INTEGER NOT NULL,
    ended      INTEGER NOT NULL,
    unreadable INTEGER NOT NULL
);

-- `body` is the row as JSON; the other columns are what it is looked for by.
CREATE TABLE projection_envelopes (
    id      TEXT PRIMARY KEY NOT NULL,
    tenant  TEXT NOT NULL,
    kind    TEXT NOT NULL,
    state   TEXT NOT NULL,
    project TEXT NOT NULL,
    body    TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX projection_by_tenant ON projection_envelopes (tenant, id);
CREATE INDEX projection_by_project ON projection_envelopes (project, id);
CREATE INDEX projection_by_kind ON projection_envelopes (kind, id);

-- Open envelopes, those that coverage counts, and those with an end other than completed.
CREATE TABLE projection_terms (
    term TEXT NOT NULL,
    id   TEXT NOT NULL,
    PRIMARY KEY (term, id)
) WITHOUT ROWID;

-- Roll-ups. A total is of text, because it may be beyond 64 bits.
CREATE TABLE projection_coverage (
    term  TEXT PRIMARY KEY NOT NULL,
    count INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE projection_counts (
    day     TEXT NOT NULL,
    tenant  TEXT NOT NULL,
    project TEXT NOT NULL,
    kind    TEXT NOT NULL,
    state   TEXT NOT NULL,
    count   INTEGER NOT NULL,
    PRIMARY KEY (day, tenant, project, kind, state)
) WITHOUT ROWID;
CREATE TABLE projection_amounts (
    day       TEXT NOT NULL,
    tenant    TEXT NOT NULL,
    project   TEXT NOT NULL,
    kind      TEXT NOT NULL,
    resource  TEXT NOT NULL,
    side      TEXT NOT NULL,
    known     INTEGER NOT NULL,
    total     TEXT NOT NULL,
    unknown   INTEGER NOT NULL,
    unlimited INTEGER NOT NULL,
    PRIMARY KEY (day, tenant, project, kind, resource, side)
) WITHOUT ROWID;
