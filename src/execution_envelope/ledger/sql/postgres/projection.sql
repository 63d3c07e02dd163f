-- A projection on PostgreSQL, beside the log: derived from it, and of one version only.
-- The epoch tells one making of the tables from another, the generation one state of them from the next.
CREATE TABLE projection_state (
    version    bigint NOT NULL,
    epoch      text COLLATE "C" NOT NULL,
    generation bigint NOT NULL
);

-- How far each chain was taken in; `ended` when nothing can follow, `unreadable` counts entries and gaps.
CREATE TABLE projection_positions (
    chain      bigint PRIMARY KEY,
    id         text COLLATE "C" NOT NULL,
    position   bigint NOT NULL,
    ended      boolean NOT NULL,
    unreadable bigint NOT NULL
);

-- `body` is the row as JSON; the other columns are what it is looked for by.
CREATE TABLE projection_envelopes (
    id      text COLLATE "C" PRIMARY KEY NOT NULL,
    tenant  text COLLATE "C" NOT NULL,
    kind    text COLLATE "C" NOT NULL,
    state   text COLLATE "C" NOT NULL,
    project text COLLATE "C" NOT NULL,
    body    text NOT NULL
);
CREATE INDEX projection_by_tenant ON projection_envelopes (tenant, id);
CREATE INDEX projection_by_project ON projection_envelopes (project, id);
CREATE INDEX projection_by_kind ON projection_envelopes (kind, id);

-- Open envelopes, those that coverage counts, and those with an end other than completed.
CREATE TABLE projection_terms (
    term text COLLATE "C" NOT NULL,
    id   text COLLATE "C" NOT NULL,
    PRIMARY KEY (term, id)
);

-- How many envelopes there are under each term.
CREATE TABLE projection_coverage (
    term  text COLLATE "C" PRIMARY KEY NOT NULL,
    count bigint NOT NULL
);

-- Roll-ups: sums over the days from `begins` on, one or seven of them, of what envelopes with these names have in
-- common. `dims` are the names of a cube, and `body` the sums, as JSON.
CREATE TABLE projection_rollups (
    cube   text COLLATE "C" NOT NULL,
    span   bigint NOT NULL,
    begins text COLLATE "C" NOT NULL,
    dims   text COLLATE "C" NOT NULL,
    tenant text COLLATE "C" NOT NULL,
    body   text NOT NULL,
    PRIMARY KEY (cube, span, begins, dims)
);

-- The weeks, by their Mondays, of which roll-ups over seven days are kept too.
CREATE TABLE projection_weeks (
    begins text COLLATE "C" PRIMARY KEY NOT NULL
);
