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

-- What many envelopes have in common, as JSON, with how many there are of it: of all, and of each tenant.
CREATE TABLE projection_shapes (
    shape bigint PRIMARY KEY,
    body  text NOT NULL,
    count bigint NOT NULL
);
CREATE TABLE projection_tenant_shapes (
    tenant text COLLATE "C" NOT NULL,
    shape  bigint NOT NULL,
    count  bigint NOT NULL,
    PRIMARY KEY (tenant, shape)
);

-- `body` is the row as JSON.
CREATE TABLE projection_envelopes (
    id   text COLLATE "C" PRIMARY KEY NOT NULL,
    body text NOT NULL
);

-- What envelopes are looked for by, beside them: narrow, because many are looked at to find a few.
CREATE TABLE projection_entries (
    id          text COLLATE "C" PRIMARY KEY NOT NULL,
    shape       bigint NOT NULL,
    tenant      text COLLATE "C" NOT NULL,
    subject     text COLLATE "C" NOT NULL,
    target      text COLLATE "C" NOT NULL,
    project     text COLLATE "C" NOT NULL,
    environment text COLLATE "C" NOT NULL,
    purpose     text COLLATE "C" NOT NULL,
    owner       text COLLATE "C" NOT NULL,
    part_of     text COLLATE "C" NOT NULL,
    created     text COLLATE "C" NOT NULL,
    ended       text COLLATE "C" NOT NULL,
    requested   jsonb NOT NULL,
    granted     jsonb NOT NULL,
    used        jsonb NOT NULL
);
CREATE INDEX projection_by_shape ON projection_entries (shape, id);
CREATE INDEX projection_by_tenant ON projection_entries (tenant, id);
CREATE INDEX projection_by_tenant_shape ON projection_entries (tenant, shape, id);
CREATE INDEX projection_by_project ON projection_entries (project, id) INCLUDE (shape);
CREATE INDEX projection_by_subject ON projection_entries (subject, id) INCLUDE (shape);

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
