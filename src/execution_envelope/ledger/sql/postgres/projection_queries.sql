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

-- name: forget_terms
TRUNCATE projection_terms

-- name: forget_coverage
TRUNCATE projection_coverage

-- name: forget_positions
TRUNCATE projection_positions

-- name: positions
SELECT chain, id, position, ended, unreadable FROM projection_positions

-- name: save_position
INSERT INTO projection_positions (chain, id, position, ended, unreadable) VALUES (%s, %s, %s, %s, %s)
ON CONFLICT (chain) DO UPDATE SET
    id = excluded.id, position = excluded.position, ended = excluded.ended, unreadable = excluded.unreadable

-- name: save_envelope
INSERT INTO projection_envelopes (id, tenant, kind, state, project, body) VALUES (%s, %s, %s, %s, %s, %s)
ON CONFLICT (id) DO UPDATE SET
    tenant = excluded.tenant, kind = excluded.kind, state = excluded.state, project = excluded.project,
    body = excluded.body

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

-- name: newest
SELECT body FROM projection_envelopes
WHERE id < %(before)s
AND (%(states)s::text IS NULL OR state IN (SELECT json_array_elements_text(%(states)s::json)))
ORDER BY id DESC LIMIT %(limit)s

-- name: newest_of_tenant
SELECT body FROM projection_envelopes
WHERE tenant = %(tenant)s AND id < %(before)s AND (%(kind)s::text IS NULL OR kind = %(kind)s)
AND (%(project)s::text IS NULL OR project = %(project)s)
AND (%(states)s::text IS NULL OR state IN (SELECT json_array_elements_text(%(states)s::json)))
ORDER BY id DESC LIMIT %(limit)s

-- name: newest_of_project
SELECT body FROM projection_envelopes
WHERE project = %(project)s AND id < %(before)s AND (%(kind)s::text IS NULL OR kind = %(kind)s)
AND (%(states)s::text IS NULL OR state IN (SELECT json_array_elements_text(%(states)s::json)))
ORDER BY id DESC LIMIT %(limit)s

-- name: newest_of_kind
SELECT body FROM projection_envelopes
WHERE kind = %(kind)s AND id < %(before)s
AND (%(states)s::text IS NULL OR state IN (SELECT json_array_elements_text(%(states)s::json)))
ORDER BY id DESC LIMIT %(limit)s

-- name: newest_of_term
SELECT e.body FROM projection_terms AS t JOIN projection_envelopes AS e ON e.id = t.id
WHERE t.term = %(term)s AND t.id < %(before)s AND (%(tenant)s::text IS NULL OR e.tenant = %(tenant)s)
AND (%(kind)s::text IS NULL OR e.kind = %(kind)s) AND (%(project)s::text IS NULL OR e.project = %(project)s)
AND (%(states)s::text IS NULL OR e.state IN (SELECT json_array_elements_text(%(states)s::json)))
ORDER BY t.id DESC LIMIT %(limit)s

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
