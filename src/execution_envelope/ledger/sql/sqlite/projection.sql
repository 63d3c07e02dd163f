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

-- What many envelopes have in common, as JSON, with how many there are of it: of all, and of each tenant.
CREATE TABLE projection_shapes (
    shape INTEGER PRIMARY KEY,
    body  TEXT NOT NULL,
    count INTEGER NOT NULL
);
CREATE TABLE projection_tenant_shapes (
    tenant TEXT NOT NULL,
    shape  INTEGER NOT NULL,
    count  INTEGER NOT NULL,
    PRIMARY KEY (tenant, shape)
) WITHOUT ROWID;

-- `body` is the row as JSON.
CREATE TABLE projection_envelopes (
    id   TEXT PRIMARY KEY NOT NULL,
    body TEXT NOT NULL
) WITHOUT ROWID;

-- What envelopes are looked for by, beside them: narrow, because many are looked at to find a few.
CREATE TABLE projection_entries (
    id          TEXT PRIMARY KEY NOT NULL,
    shape       INTEGER NOT NULL,
    tenant      TEXT NOT NULL,
    subject     TEXT NOT NULL,
    target      TEXT NOT NULL,
    project     TEXT NOT NULL,
    environment TEXT NOT NULL,
    purpose     TEXT NOT NULL,
    owner       TEXT NOT NULL,
    part_of     TEXT NOT NULL,
    created     TEXT NOT NULL,
    ended       TEXT NOT NULL,
    requested   TEXT NOT NULL,
    granted     TEXT NOT NULL,
    used        TEXT NOT NULL
) WITHOUT ROWID;
CREATE INDEX projection_by_shape ON projection_entries (shape, id);
CREATE INDEX projection_by_tenant ON projection_entries (tenant, id);
CREATE INDEX projection_by_tenant_shape ON projection_entries (tenant, shape, id);
CREATE INDEX projection_by_project ON projection_entries (project, id, shape);
CREATE INDEX projection_by_subject ON projection_entries (subject, id, shape);

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
