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
INSERT INTO projection_envelopes (id, tenant, kind, state, project, body) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET
    tenant = excluded.tenant, kind = excluded.kind, state = excluded.state, project = excluded.project,
    body = excluded.body

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

-- name: newest
SELECT body FROM projection_envelopes
WHERE id < :before AND (:states IS NULL OR state IN (SELECT value FROM json_each(:states)))
ORDER BY id DESC LIMIT :limit

-- name: newest_of_tenant
SELECT body FROM projection_envelopes INDEXED BY projection_by_tenant
WHERE tenant = :tenant AND id < :before AND (:kind IS NULL OR kind = :kind)
AND (:project IS NULL OR project = :project) AND (:states IS NULL OR state IN (SELECT value FROM json_each(:states)))
ORDER BY id DESC LIMIT :limit

-- name: newest_of_project
SELECT body FROM projection_envelopes INDEXED BY projection_by_project
WHERE project = :project AND id < :before AND (:kind IS NULL OR kind = :kind)
AND (:states IS NULL OR state IN (SELECT value FROM json_each(:states)))
ORDER BY id DESC LIMIT :limit

-- name: newest_of_kind
SELECT body FROM projection_envelopes INDEXED BY projection_by_kind
WHERE kind = :kind AND id < :before AND (:states IS NULL OR state IN (SELECT value FROM json_each(:states)))
ORDER BY id DESC LIMIT :limit

-- name: newest_of_term
SELECT e.body FROM projection_terms AS t CROSS JOIN projection_envelopes AS e ON e.id = t.id
WHERE t.term = :term AND t.id < :before AND (:tenant IS NULL OR e.tenant = :tenant)
AND (:kind IS NULL OR e.kind = :kind) AND (:project IS NULL OR e.project = :project)
AND (:states IS NULL OR e.state IN (SELECT value FROM json_each(:states)))
ORDER BY t.id DESC LIMIT :limit

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
