-- name: begin
INSERT INTO projection_state (version, epoch, generation) VALUES (?, ?, 0)

-- name: version
SELECT version FROM projection_state

-- name: state
SELECT epoch, generation FROM projection_state

-- name: state_to_write
SELECT epoch, generation FROM projection_state

-- name: advance
UPDATE projection_state SET generation = generation + 1

-- name: renew
UPDATE projection_state SET epoch = ?, generation = 0

-- name: forget_envelopes
DELETE FROM projection_envelopes

-- name: forget_entries
DELETE FROM projection_entries

-- name: forget_shapes
DELETE FROM projection_shapes

-- name: forget_tenant_shapes
DELETE FROM projection_tenant_shapes

-- name: forget_terms
DELETE FROM projection_terms

-- name: forget_coverage
DELETE FROM projection_coverage

-- name: forget_positions
DELETE FROM projection_positions

-- name: positions
SELECT chain, id, position, ended, unreadable FROM projection_positions

-- name: save_position
INSERT INTO projection_positions (chain, id, position, ended, unreadable) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (chain) DO UPDATE SET
    id = excluded.id, position = excluded.position, ended = excluded.ended, unreadable = excluded.unreadable

-- name: save_envelope
INSERT INTO projection_envelopes (id, body) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET body = excluded.body

-- name: save_entry
INSERT INTO projection_entries (id, shape, tenant, subject, target, project, environment, purpose, owner, part_of,
    created, ended, requested, granted, used)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET
    shape = excluded.shape, tenant = excluded.tenant, subject = excluded.subject, target = excluded.target,
    project = excluded.project, environment = excluded.environment, purpose = excluded.purpose, owner = excluded.owner,
    part_of = excluded.part_of, created = excluded.created, ended = excluded.ended, requested = excluded.requested,
    granted = excluded.granted, used = excluded.used

-- name: save_shape
INSERT INTO projection_shapes (shape, body, count) VALUES (?, ?, 0)

-- name: add_shape
UPDATE projection_shapes SET count = count + ? WHERE shape = ?

-- name: add_tenant_shape
INSERT INTO projection_tenant_shapes (tenant, shape, count) VALUES (?, ?, ?)
ON CONFLICT (tenant, shape) DO UPDATE SET count = count + excluded.count

-- name: trim_tenant_shape
DELETE FROM projection_tenant_shapes WHERE tenant = ? AND shape = ? AND count = 0

-- name: find_term
INSERT INTO projection_terms (term, id) VALUES (?, ?)

-- name: lose_term
DELETE FROM projection_terms WHERE term = ? AND id = ?

-- name: add_coverage
INSERT INTO projection_coverage (term, count) VALUES (?, ?)
ON CONFLICT (term) DO UPDATE SET count = count + excluded.count

-- name: rows
SELECT body FROM projection_envelopes WHERE id IN (SELECT value FROM json_each(:ids))

-- name: get
SELECT body FROM projection_envelopes WHERE id = :id

-- name: shapes
SELECT shape, body FROM projection_shapes WHERE shape > :after ORDER BY shape

-- name: count
SELECT coalesce(max(count), 0) FROM projection_coverage WHERE term = 'envelopes'

-- name: shape_counts
SELECT shape, count FROM projection_shapes WHERE count > 0

-- name: tenant_shape_counts
SELECT tenant, shape, count FROM projection_tenant_shapes WHERE tenant IN (SELECT value FROM json_each(:tenants))

-- name: entries
SELECT id FROM projection_entries WHERE id < :before AND id >= :floor ORDER BY id DESC LIMIT :limit

-- name: entries_of_project
SELECT id, shape FROM projection_entries INDEXED BY projection_by_project
WHERE project = :value AND id < :before ORDER BY id DESC LIMIT :limit

-- name: entries_of_subject
SELECT id, shape FROM projection_entries INDEXED BY projection_by_subject
WHERE subject = :value AND id < :before ORDER BY id DESC LIMIT :limit

-- name: entries_of_shapes
SELECT j.key, (SELECT json_group_array(id) FROM (
    SELECT id FROM projection_entries INDEXED BY projection_by_shape
    WHERE shape = json_extract(j.value, '$[0]')
    AND id < json_extract(j.value, '$[1]') AND id >= json_extract(j.value, '$[2]')
    ORDER BY id DESC LIMIT :limit))
FROM json_each(:runs) AS j

-- name: entries_of_shapes_of_tenants
SELECT j.key, (SELECT json_group_array(id) FROM (
    SELECT id FROM projection_entries INDEXED BY projection_by_tenant_shape
    WHERE tenant = json_extract(j.value, '$[3]') AND shape = json_extract(j.value, '$[0]')
    AND id < json_extract(j.value, '$[1]') AND id >= json_extract(j.value, '$[2]')
    ORDER BY id DESC LIMIT :limit))
FROM json_each(:runs) AS j

-- name: entries_of_tenants
SELECT j.key, (SELECT json_group_array(id) FROM (
    SELECT id FROM projection_entries INDEXED BY projection_by_tenant
    WHERE tenant = json_extract(j.value, '$[3]')
    AND id < json_extract(j.value, '$[1]') AND id >= json_extract(j.value, '$[2]')
    ORDER BY id DESC LIMIT :limit))
FROM json_each(:runs) AS j

-- name: created
SELECT created FROM projection_entries WHERE id = :id

-- name: fitting
-- By id and nothing else: the plus keeps other indexes out.
SELECT e.id FROM json_each(:ids) AS j CROSS JOIN projection_entries AS e ON e.id = j.value WHERE {where}

-- name: fitting_of_project
-- By id within those of the project: of the others no more is read than the index.
SELECT e.id FROM json_each(:ids) AS j CROSS JOIN projection_entries AS e INDEXED BY projection_by_project
ON e.project = {value} AND e.id = j.value WHERE {where}

-- name: fitting_of_subject
SELECT e.id FROM json_each(:ids) AS j CROSS JOIN projection_entries AS e INDEXED BY projection_by_subject
ON e.subject = {value} AND e.id = j.value WHERE {where}

-- name: where_shape
+e.{column} IN (SELECT value FROM json_each({value}))

-- name: where_equal
+e.{column} IN (SELECT value FROM json_each({value}))

-- name: where_contains
instr(lower(e.{column}), {value}) > 0

-- name: where_since
+e.{column} <> '' AND +e.{column} >= {value}

-- name: where_before
+e.{column} <> '' AND +e.{column} < {value}

-- name: amount
json_extract(e.{column}, '$.' || {value})

-- name: value
:{name}

-- name: oldest_of_term
SELECT id FROM projection_terms WHERE term = :term ORDER BY id

-- name: ids_of_term
SELECT id FROM projection_terms WHERE term = :term ORDER BY id DESC LIMIT :limit

-- name: coverage
SELECT term, count FROM projection_coverage

-- name: unreadable
SELECT coalesce(sum(unreadable), 0) FROM projection_positions

-- name: log_chains
SELECT number, id FROM chains ORDER BY number

-- name: log_head
SELECT place & 4294967295 FROM events WHERE place >= :chain << 32 AND place < (:chain + 1) << 32
ORDER BY place DESC LIMIT 1

-- name: log_entries
SELECT place & 4294967295, body, sealed FROM events
WHERE place > (:chain << 32) + :after AND place <= (:chain << 32) + :until ORDER BY place LIMIT :limit

-- name: log_records
SELECT p.envelope, e.body, e.sealed FROM json_each(:ids) AS j
CROSS JOIN places AS p ON p.envelope = j.value LEFT JOIN events AS e ON e.place = p.place
ORDER BY p.envelope, p.sequence

-- name: forget_rollups
DELETE FROM projection_rollups

-- name: rollups_there
SELECT dims, body FROM projection_rollups
WHERE cube = :cube AND span = :span AND begins = :begins AND dims IN (SELECT value FROM json_each(:dims))

-- name: save_rollup
INSERT INTO projection_rollups (cube, span, begins, dims, tenant, body) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (cube, span, begins, dims) DO UPDATE SET body = excluded.body

-- name: drop_rollup
DELETE FROM projection_rollups WHERE cube = ? AND span = ? AND begins = ? AND dims = ?

-- name: rollup_days
SELECT min(begins), max(begins) FROM projection_rollups WHERE cube = :cube AND span = 1

-- name: rollups
SELECT begins, dims, body FROM projection_rollups
WHERE cube = :cube AND span = :span AND begins >= :begins AND begins <= :ends
AND (:tenants IS NULL OR tenant IN (SELECT value FROM json_each(:tenants)))
ORDER BY begins

-- name: rollup_days_there
SELECT DISTINCT begins FROM projection_rollups WHERE cube = :cube AND span = 1

-- name: weeks
SELECT begins FROM projection_weeks

-- name: save_week
INSERT INTO projection_weeks (begins) VALUES (?)

-- name: forget_weeks
DELETE FROM projection_weeks
