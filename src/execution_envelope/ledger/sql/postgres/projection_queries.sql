-- name: begin
INSERT INTO projection_state (version, epoch, generation) VALUES (%s, %s, 0)

-- name: version
SELECT version FROM projection_state

-- name: state
SELECT epoch, generation FROM projection_state

-- name: state_to_write
SELECT epoch, generation FROM projection_state FOR UPDATE

-- name: advance
UPDATE projection_state SET generation = generation + 1

-- name: renew
UPDATE projection_state SET epoch = %s, generation = 0

-- name: forget_envelopes
TRUNCATE projection_envelopes

-- name: forget_entries
TRUNCATE projection_entries

-- name: forget_shapes
TRUNCATE projection_shapes

-- name: forget_tenant_shapes
TRUNCATE projection_tenant_shapes

-- name: forget_terms
TRUNCATE projection_terms

-- name: forget_coverage
TRUNCATE projection_coverage

-- name: forget_positions
TRUNCATE projection_positions

-- name: begin_reading
-- Locked before the first look, in the order in which they are emptied.
BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;
LOCK TABLE projection_envelopes, projection_entries, projection_shapes, projection_tenant_shapes, projection_terms,
    projection_coverage, projection_positions, projection_rollups, projection_weeks IN ACCESS SHARE MODE

-- name: positions
SELECT chain, id, position, ended, unreadable FROM projection_positions

-- name: save_position
INSERT INTO projection_positions (chain, id, position, ended, unreadable) VALUES (%s, %s, %s, %s, %s)
ON CONFLICT (chain) DO UPDATE SET
    id = excluded.id, position = excluded.position, ended = excluded.ended, unreadable = excluded.unreadable

-- name: save_envelope
INSERT INTO projection_envelopes (id, body) VALUES (%s, %s) ON CONFLICT (id) DO UPDATE SET body = excluded.body

-- name: save_entry
INSERT INTO projection_entries (id, shape, tenant, subject, target, project, environment, purpose, owner, part_of,
    created, ended, requested, granted, used)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
ON CONFLICT (id) DO UPDATE SET
    shape = excluded.shape, tenant = excluded.tenant, subject = excluded.subject, target = excluded.target,
    project = excluded.project, environment = excluded.environment, purpose = excluded.purpose, owner = excluded.owner,
    part_of = excluded.part_of, created = excluded.created, ended = excluded.ended, requested = excluded.requested,
    granted = excluded.granted, used = excluded.used

-- name: save_shape
INSERT INTO projection_shapes (shape, body, count) VALUES (%s, %s, 0)

-- name: add_shape
UPDATE projection_shapes SET count = count + %s WHERE shape = %s

-- name: add_tenant_shape
INSERT INTO projection_tenant_shapes (tenant, shape, count) VALUES (%s, %s, %s)
ON CONFLICT (tenant, shape) DO UPDATE SET count = projection_tenant_shapes.count + excluded.count

-- name: trim_tenant_shape
DELETE FROM projection_tenant_shapes WHERE tenant = %s AND shape = %s AND count = 0

-- name: find_term
INSERT INTO projection_terms (term, id) VALUES (%s, %s)

-- name: lose_term
DELETE FROM projection_terms WHERE term = %s AND id = %s

-- name: add_coverage
INSERT INTO projection_coverage (term, count) VALUES (%s, %s)
ON CONFLICT (term) DO UPDATE SET count = projection_coverage.count + excluded.count

-- name: rows
SELECT body FROM projection_envelopes WHERE id IN (SELECT json_array_elements_text(%(ids)s::json))

-- name: get
SELECT body FROM projection_envelopes WHERE id = %(id)s

-- name: shapes
SELECT shape, body FROM projection_shapes WHERE shape > %(after)s ORDER BY shape

-- name: count
SELECT coalesce(max(count), 0) FROM projection_coverage WHERE term = 'envelopes'

-- name: shape_counts
SELECT shape, count FROM projection_shapes WHERE count > 0

-- name: tenant_shape_counts
SELECT tenant, shape, count FROM projection_tenant_shapes
WHERE tenant IN (SELECT json_array_elements_text(%(tenants)s::json))

-- name: entries
SELECT id FROM projection_entries WHERE id < %(before)s AND id >= %(floor)s ORDER BY id DESC LIMIT %(limit)s

-- name: entries_of_project
-- The pairs are compared and ordered as a whole, so that no other index will do.
SELECT id, shape FROM projection_entries
WHERE (project, id) < (%(value)s, %(before)s) AND (project, id) >= (%(value)s, '')
ORDER BY project DESC, id DESC LIMIT %(limit)s

-- name: entries_of_subject
SELECT id, shape FROM projection_entries
WHERE (subject, id) < (%(value)s, %(before)s) AND (subject, id) >= (%(value)s, '')
ORDER BY subject DESC, id DESC LIMIT %(limit)s

-- name: entries_of_shapes
SELECT j.number - 1, (SELECT json_agg(id)::text FROM (
    SELECT id FROM projection_entries
    WHERE (shape, id) < ((j.run ->> 0)::bigint, j.run ->> 1) AND (shape, id) >= ((j.run ->> 0)::bigint, j.run ->> 2)
    ORDER BY shape DESC, id DESC LIMIT %(limit)s) AS e)
FROM json_array_elements(%(runs)s::json) WITH ORDINALITY AS j (run, number)

-- name: entries_of_shapes_of_tenants
SELECT j.number - 1, (SELECT json_agg(id)::text FROM (
    SELECT id FROM projection_entries
    WHERE (tenant, shape, id) < (j.run ->> 3, (j.run ->> 0)::bigint, j.run ->> 1)
    AND (tenant, shape, id) >= (j.run ->> 3, (j.run ->> 0)::bigint, j.run ->> 2)
    ORDER BY tenant DESC, shape DESC, id DESC LIMIT %(limit)s) AS e)
FROM json_array_elements(%(runs)s::json) WITH ORDINALITY AS j (run, number)

-- name: entries_of_tenants
SELECT j.number - 1, (SELECT json_agg(id)::text FROM (
    SELECT id FROM projection_entries
    WHERE (tenant, id) < (j.run ->> 3, j.run ->> 1) AND (tenant, id) >= (j.run ->> 3, j.run ->> 2)
    ORDER BY tenant DESC, id DESC LIMIT %(limit)s) AS e)
FROM json_array_elements(%(runs)s::json) WITH ORDINALITY AS j (run, number)

-- name: created
SELECT created FROM projection_entries WHERE id = %(id)s

-- name: fitting
-- By id and nothing else: what is materialized is not planned together.
WITH few AS MATERIALIZED (
    SELECT {columns} FROM projection_entries WHERE id IN (SELECT json_array_elements_text(%(ids)s::json)))
SELECT e.id FROM few AS e WHERE {where}

-- name: fitting_of_project
-- One id after the other, within those of the project: of the others no more is read than the index.
WITH few AS MATERIALIZED (
    SELECT f.* FROM json_array_elements_text(%(ids)s::json) AS j (wanted) CROSS JOIN LATERAL (
        SELECT {columns} FROM projection_entries WHERE project = {value} AND id = j.wanted OFFSET 0) AS f)
SELECT e.id FROM few AS e WHERE {where}

-- name: fitting_of_subject
WITH few AS MATERIALIZED (
    SELECT f.* FROM json_array_elements_text(%(ids)s::json) AS j (wanted) CROSS JOIN LATERAL (
        SELECT {columns} FROM projection_entries WHERE subject = {value} AND id = j.wanted OFFSET 0) AS f)
SELECT e.id FROM few AS e WHERE {where}

-- name: where_shape
e.{column} IN (SELECT json_array_elements_text({value}::json)::bigint)

-- name: where_equal
e.{column} IN (SELECT json_array_elements_text({value}::json))

-- name: where_contains
strpos(lower(e.{column}), {value}::text) > 0

-- name: where_since
e.{column} <> '' AND e.{column} >= {value}

-- name: where_before
e.{column} <> '' AND e.{column} < {value}

-- name: amount
(e.{column} ->> {value}::text)::bigint

-- name: value
%({name})s

-- name: oldest_of_term
SELECT id FROM projection_terms WHERE term = %(term)s ORDER BY id

-- name: ids_of_term
SELECT id FROM projection_terms WHERE term = %(term)s ORDER BY id DESC LIMIT %(limit)s

-- name: coverage
SELECT term, count FROM projection_coverage

-- name: unreadable
SELECT coalesce(sum(unreadable), 0)::bigint FROM projection_positions

-- name: session
SELECT set_config('synchronous_commit', 'off', false), set_config('statement_timeout', '60s', false),
    set_config('lock_timeout', '60s', false), set_config('idle_in_transaction_session_timeout', '60s', false)

-- name: tables
SELECT relname::text FROM pg_class WHERE relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema())
AND relkind = 'r' AND relname LIKE 'projection\_%%'

-- name: lock
SELECT pg_advisory_xact_lock(1702258004, (oid::bigint %% 2147483647)::int)::text
FROM pg_namespace WHERE nspname = current_schema()

-- name: log_records
SELECT p.envelope, e.body, e.sealed
FROM places AS p LEFT JOIN events AS e ON e.chain = p.chain AND e.position = p.position
WHERE p.envelope = ANY (%(ids)s::text[]) ORDER BY p.envelope, p.sequence

-- name: forget_rollups
TRUNCATE projection_rollups

-- name: rollups_there
SELECT dims, body FROM projection_rollups
WHERE cube = %(cube)s AND span = %(span)s AND begins = %(begins)s AND dims IN (SELECT json_array_elements_text(%(dims)s::json))

-- name: save_rollup
INSERT INTO projection_rollups (cube, span, begins, dims, tenant, body) VALUES (%s, %s, %s, %s, %s, %s)
ON CONFLICT (cube, span, begins, dims) DO UPDATE SET body = excluded.body

-- name: drop_rollup
DELETE FROM projection_rollups WHERE cube = %s AND span = %s AND begins = %s AND dims = %s

-- name: rollup_days
SELECT min(begins), max(begins) FROM projection_rollups WHERE cube = %(cube)s AND span = 1

-- name: rollups
SELECT begins, dims, body FROM projection_rollups
WHERE cube = %(cube)s AND span = %(span)s AND begins >= %(begins)s AND begins <= %(ends)s
AND (%(tenants)s::text IS NULL OR tenant IN (SELECT json_array_elements_text(%(tenants)s::json)))
ORDER BY begins

-- name: rollup_days_there
SELECT DISTINCT begins FROM projection_rollups WHERE cube = %(cube)s AND span = 1

-- name: weeks
SELECT begins FROM projection_weeks

-- name: save_week
INSERT INTO projection_weeks (begins) VALUES (%s)

-- name: forget_weeks
TRUNCATE projection_weeks
