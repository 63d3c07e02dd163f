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

-- How many envelopes there are under each term.
CREATE TABLE projection_coverage (
    term  TEXT PRIMARY KEY NOT NULL,
    count INTEGER NOT NULL
) WITHOUT ROWID;

-- Roll-ups: sums over the days from `begins` on, one or seven of them, of what envelopes with these names have in
-- common. `dims` are the names of a cube, and `body` the sums, as JSON.
CREATE TABLE projection_rollups (
    cube   TEXT NOT NULL,
    span   INTEGER NOT NULL,
    begins TEXT NOT NULL,
    dims   TEXT NOT NULL,
    tenant TEXT NOT NULL,
    body   TEXT NOT NULL,
    PRIMARY KEY (cube, span, begins, dims)
) WITHOUT ROWID;

-- The weeks, by their Mondays, of which roll-ups over seven days are kept too.
CREATE TABLE projection_weeks (
    begins TEXT PRIMARY KEY NOT NULL
) WITHOUT ROWID;
