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

-- name: forget_counts
DELETE FROM projection_counts

-- name: forget_amounts
DELETE FROM projection_amounts

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

-- name: add_count
INSERT INTO projection_counts (day, tenant, project, kind, state, count) VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (day, tenant, project, kind, state) DO UPDATE SET count = count + excluded.count

-- name: trim_count
DELETE FROM projection_counts WHERE day = ? AND tenant = ? AND project = ? AND kind = ? AND state = ? AND count = 0

-- name: add_amount
INSERT INTO projection_amounts (day, tenant, project, kind, resource, side, known, total, unknown, unlimited)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (day, tenant, project, kind, resource, side) DO UPDATE SET
    known = known + excluded.known, total = exact_sum(total, excluded.total), unknown = unknown + excluded.unknown,
    unlimited = unlimited + excluded.unlimited

-- name: trim_amount
DELETE FROM projection_amounts
WHERE day = ? AND tenant = ? AND project = ? AND kind = ? AND resource = ? AND side = ?
AND known = 0 AND unknown = 0 AND unlimited = 0

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

-- name: counts
SELECT day, tenant, project, kind, state, count FROM projection_counts
WHERE day >= :day_from AND day <= :day_to AND (:tenant IS NULL OR tenant = :tenant)

-- name: amounts
SELECT day, tenant, project, kind, resource, side, known, total, unknown, unlimited FROM projection_amounts
WHERE day >= :day_from AND day <= :day_to AND (:tenant IS NULL OR tenant = :tenant)

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
