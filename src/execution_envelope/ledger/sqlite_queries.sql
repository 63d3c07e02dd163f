-- name: insert_envelope
INSERT INTO envelopes (id, body, digest, parent) VALUES (?, ?, ?, ?)

-- name: insert_event
INSERT INTO events (chain, position, envelope, sequence, type, body, hash) VALUES (?, ?, ?, ?, ?, ?, ?)

-- name: insert_key
INSERT INTO keys (digest, request, envelope) VALUES (?, ?, ?)

-- name: insert_closing
INSERT INTO closings (envelope) VALUES (?)

-- name: insert_binding
INSERT INTO bindings (kind, reference, envelope) VALUES (?, ?, ?) ON CONFLICT DO NOTHING

-- name: next_sequence
SELECT coalesce(max(sequence) + 1, 0) FROM events WHERE envelope = ?

-- name: key
SELECT digest, request, envelope FROM keys WHERE digest = ?

-- name: schema
SELECT type || ' ' || name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite\_%' ESCAPE '\' ORDER BY name

-- name: schema_version
SELECT version FROM ledger_schema

-- name: body
SELECT body FROM envelopes WHERE id = ?

-- name: events_of
SELECT body FROM events WHERE envelope = ? ORDER BY sequence

-- name: find
SELECT envelope FROM bindings AS b WHERE kind = ? AND reference = ? ORDER BY
    NOT EXISTS (SELECT 1 FROM closings AS c WHERE c.envelope = b.envelope)
        OR EXISTS (SELECT 1 FROM events AS e WHERE e.envelope = b.envelope AND e.type = 'granted') DESC,
    ordinal DESC
LIMIT 1

-- name: children
SELECT id FROM envelopes WHERE parent = ? ORDER BY id

-- name: newest
SELECT id FROM envelopes WHERE id < ? ORDER BY id DESC LIMIT ?

-- name: unfinished
SELECT id FROM envelopes WHERE NOT EXISTS (SELECT 1 FROM closings WHERE envelope = id) ORDER BY id

-- name: opening
SELECT body FROM events WHERE chain = ? AND position = 0

-- name: chain_of
SELECT chain FROM events WHERE envelope = ? AND sequence = ?

-- name: insert_attempted
INSERT INTO attempted_requests (at, surface, reason, status, detail, request_id, dropped) VALUES (?, ?, ?, ?, ?, ?, ?)

-- name: trim_attempted
DELETE FROM attempted_requests WHERE ordinal <= (SELECT max(ordinal) FROM attempted_requests) - ?

-- name: attempted
SELECT at, surface, reason, status, detail, request_id, dropped FROM attempted_requests ORDER BY ordinal DESC LIMIT ?

-- name: rows
SELECT cursor, chain, position, envelope, sequence, type, body, hash FROM events WHERE cursor > ? ORDER BY cursor LIMIT ?

-- name: rows_of
SELECT cursor, chain, position, envelope, sequence, type, body, hash FROM events
WHERE cursor > ? AND envelope = ? ORDER BY cursor LIMIT ?

-- name: envelopes
SELECT id, body, digest, parent FROM envelopes WHERE id > ? ORDER BY id LIMIT ?

-- name: keys
SELECT digest, request, envelope FROM keys WHERE digest > ? ORDER BY digest LIMIT ?

-- name: bindings
SELECT ordinal, kind, reference, envelope FROM bindings WHERE ordinal > ? ORDER BY ordinal LIMIT ?

-- name: closings
SELECT envelope FROM closings WHERE envelope > ? ORDER BY envelope LIMIT ?

-- name: count
SELECT count(*) FROM events
