-- name: open_chain
INSERT INTO chains (number, id)
SELECT coalesce((SELECT max(number) FROM chains WHERE number >= s.number * 1000000) + 1, s.number * 1000000), ?
FROM (SELECT max(number) AS number FROM segments) AS s RETURNING number

-- name: insert_key
INSERT INTO keys (digest, request, envelope) VALUES (?, ?, ?)

-- name: insert_closing
INSERT INTO closings (envelope) VALUES (?)

-- name: insert_child
INSERT INTO children (parent, envelope) VALUES (?, ?)

-- name: insert_binding
INSERT INTO bindings (kind, reference, ordinal, envelope) VALUES (?, ?, ?, ?)

-- name: line
SELECT envelope FROM bindings WHERE kind = ? AND reference = ? ORDER BY ordinal

-- name: next_sequence
SELECT coalesce(max(sequence) + 1, 0) FROM places WHERE envelope = ?

-- name: key
SELECT digest, request, envelope FROM keys WHERE digest = ?

-- name: schema
SELECT type || ' ' || name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite\_%' ESCAPE '\' ORDER BY name

-- name: schema_version
SELECT version FROM ledger_schema

-- name: segments
SELECT number FROM segments ORDER BY number

-- name: sealed
SELECT sealed FROM events WHERE place = (SELECT place FROM places WHERE envelope = ? AND sequence = 0)

-- name: events_of
SELECT e.body, e.sealed FROM places AS p
LEFT JOIN events AS e ON e.place = p.place
WHERE p.envelope = ? ORDER BY p.sequence

-- name: find
SELECT envelope FROM bindings AS b WHERE kind = ? AND reference = ? ORDER BY
    NOT EXISTS (SELECT 1 FROM closings AS c WHERE c.envelope = b.envelope)
        OR EXISTS (SELECT 1 FROM places AS p WHERE p.envelope = b.envelope AND p.type = 'granted') DESC,
    ordinal DESC
LIMIT 1

-- name: children
SELECT envelope FROM children WHERE parent = ? ORDER BY envelope

-- name: newest
SELECT envelope FROM places WHERE envelope < ? AND sequence = 0 ORDER BY envelope DESC LIMIT ?

-- name: unfinished
SELECT envelope FROM places AS p WHERE sequence = 0 AND NOT EXISTS (SELECT 1 FROM closings AS c WHERE c.envelope = p.envelope)
ORDER BY envelope

-- name: opening
SELECT body FROM events WHERE place = (SELECT number << 32 FROM chains WHERE id = ?)

-- name: chain_of
SELECT c.id FROM places AS p JOIN chains AS c ON c.number = p.place >> 32 WHERE p.envelope = ? AND p.sequence = ?

-- name: chain_number
SELECT number FROM chains WHERE id = ?

-- name: insert_attempted
INSERT INTO attempted_requests (at, surface, reason, status, detail, request_id, dropped) VALUES (?, ?, ?, ?, ?, ?, ?)

-- name: trim_attempted
DELETE FROM attempted_requests WHERE ordinal <= (SELECT max(ordinal) FROM attempted_requests) - ?

-- name: attempted
SELECT at, surface, reason, status, detail, request_id, dropped FROM attempted_requests ORDER BY ordinal DESC LIMIT ?

-- name: chains
SELECT number, id FROM chains ORDER BY number

-- name: head
SELECT place & 4294967295, hash FROM events WHERE place >= ?1 << 32 AND place < (?1 + 1) << 32 ORDER BY place DESC LIMIT 1

-- name: rows
SELECT place & 4294967295, body, hash, sealed FROM events WHERE place > ? AND place < ? ORDER BY place LIMIT ?

-- name: rows_of
SELECT c.id, p.place & 4294967295, e.body, e.hash, e.sealed
FROM places AS p
LEFT JOIN events AS e ON e.place = p.place
LEFT JOIN chains AS c ON c.number = p.place >> 32
WHERE p.envelope = ? AND e.place IS NOT NULL ORDER BY p.sequence

-- name: steps
-- Text that is no UTF-8, because somebody changed it, comes back as bytes: pages begin behind it all the same.
SELECT p.envelope, p.sequence, p.type, p.place >> 32, p.place & 4294967295, c.envelope IS NOT NULL,
    e.body, e.hash, e.sealed, b.hash
FROM places AS p
LEFT JOIN events AS e ON e.place = p.place
LEFT JOIN events AS b ON b.place = p.place - 1
LEFT JOIN closings AS c ON c.envelope = p.envelope
WHERE (p.envelope, p.sequence) > (CAST(? AS TEXT), ?) AND p.envelope <= ?
ORDER BY p.envelope, p.sequence LIMIT ?

-- name: events_of_many
SELECT p.envelope, p.sequence, p.type, p.place >> 32, p.place & 4294967295, c.envelope IS NOT NULL,
    e.body, e.hash, e.sealed, b.hash
FROM places AS p
LEFT JOIN events AS e ON e.place = p.place
LEFT JOIN events AS b ON b.place = p.place - 1
LEFT JOIN closings AS c ON c.envelope = p.envelope
WHERE p.envelope IN (SELECT value FROM json_each(?)) AND p.type IN (SELECT value FROM json_each(?))
ORDER BY p.envelope, p.sequence

-- name: decisions
SELECT p.envelope, p.sequence, p.type, p.place >> 32, p.place & 4294967295,
    p.sequence = 0 AND EXISTS (SELECT 1 FROM closings AS c WHERE c.envelope = p.envelope), e.body, e.sealed
FROM places AS p
LEFT JOIN events AS e ON e.place = p.place
WHERE (p.envelope, p.sequence) > (CAST(? AS TEXT), ?) AND p.envelope <= ?
    AND p.type IN (SELECT value FROM json_each(?))
ORDER BY p.envelope, p.sequence LIMIT ?

-- name: split
SELECT envelope FROM places WHERE envelope > ? ORDER BY envelope LIMIT 1 OFFSET ?

-- name: strays
-- One gap between chain numbers after the other, behind each number that has no next one.
SELECT e.place >> 32, e.place & 4294967295
FROM (
    SELECT -0x7fffffffffffffff - 1 AS first, coalesce((SELECT (min(number) << 32) - 1 FROM chains), 0x7fffffffffffffff) AS last
    UNION ALL
    SELECT (c.number + 1) << 32,
        coalesce((SELECT (min(number) << 32) - 1 FROM chains WHERE number > c.number), 0x7fffffffffffffff)
    FROM chains AS c WHERE NOT EXISTS (SELECT 1 FROM chains AS n WHERE n.number = c.number + 1)
) AS gap
JOIN events AS e ON e.place BETWEEN gap.first AND gap.last
LIMIT 100

-- name: keys
-- Bytes are behind all text, whatever a page begins behind: `odd` tells of them.
SELECT digest, request, envelope FROM keys WHERE digest > CAST(? AS TEXT) AND typeof(digest) = 'text'
ORDER BY digest LIMIT ?

-- name: bindings
SELECT kind, reference, ordinal, envelope FROM bindings
WHERE (kind, reference, ordinal) > (CAST(? AS TEXT), CAST(? AS TEXT), ?)
    AND typeof(kind) = 'text' AND typeof(reference) = 'text'
ORDER BY kind, reference, ordinal LIMIT ?

-- name: families
SELECT parent, envelope FROM children WHERE (parent, envelope) > (CAST(? AS TEXT), CAST(? AS TEXT))
    AND typeof(parent) = 'text' AND typeof(envelope) = 'text'
ORDER BY parent, envelope LIMIT ?

-- name: closings
SELECT envelope FROM closings
WHERE envelope > CAST(?1 AS TEXT) AND (?2 IS NULL OR envelope <= ?2) AND typeof(envelope) = 'text'
ORDER BY envelope LIMIT ?3

-- name: odd
SELECT * FROM (
    SELECT 'places', quote(envelope) FROM places WHERE envelope >= x''
    UNION ALL SELECT 'closings', quote(envelope) FROM closings WHERE envelope >= x''
    UNION ALL SELECT 'keys', quote(digest) FROM keys WHERE digest >= x''
    UNION ALL SELECT 'bindings', quote(kind) || ', ' || quote(reference) FROM bindings
        WHERE typeof(kind) <> 'text' OR typeof(reference) <> 'text'
    UNION ALL SELECT 'children', quote(parent) || ', ' || quote(envelope) FROM children
        WHERE typeof(parent) <> 'text' OR typeof(envelope) <> 'text'
) LIMIT 100

-- name: count
SELECT count(*) FROM events

-- name: renew
INSERT INTO leases (chain, renewals) SELECT number, 1 FROM chains WHERE id IN (SELECT value FROM json_each(?))
ON CONFLICT (chain) DO UPDATE SET renewals = renewals + 1

-- name: lease
SELECT renewals FROM leases WHERE chain = (SELECT number FROM chains WHERE id = ?)

-- name: insert_checkpoint
INSERT INTO checkpoints (number, body) VALUES (?, ?)

-- name: checkpoint
SELECT body FROM checkpoints WHERE number = ?

-- name: checkpoints
SELECT body FROM (SELECT number, body FROM checkpoints ORDER BY number DESC LIMIT ?) ORDER BY number

-- name: newest_segment
SELECT max(number) FROM segments

-- name: insert_segment
INSERT INTO segments (number) VALUES (?)

-- name: living
SELECT CAST(substr(name, 8) AS INTEGER) FROM sqlite_schema WHERE type = 'table' AND name GLOB 'events_[0-9]*' ORDER BY 1

-- name: exported
SELECT segment FROM exports ORDER BY segment

-- name: exports
SELECT segment, body, checkpoint FROM exports ORDER BY segment

-- name: insert_export
INSERT INTO exports (segment, body, checkpoint) VALUES (?, ?, ?)

-- name: segments_of
SELECT DISTINCT (place >> 32) / 1000000 FROM places WHERE envelope = ? ORDER BY 1

-- name: closed
SELECT 1 FROM closings WHERE envelope = ?

-- name: envelopes_in
SELECT count(DISTINCT envelope) FROM places WHERE place >= ?1 * 1000000 << 32 AND place < (?1 + 1) * 1000000 << 32

-- name: unfinished_in
SELECT DISTINCT p.envelope FROM places AS p
WHERE p.place >= ?1 * 1000000 << 32 AND p.place < (?1 + 1) * 1000000 << 32
    AND NOT EXISTS (SELECT 1 FROM closings AS c WHERE c.envelope = p.envelope)
ORDER BY 1 LIMIT ?2

-- name: part
-- Where a range of about so many places ends.
SELECT envelope FROM places WHERE envelope > ? AND envelope <= ? ORDER BY envelope LIMIT 1 OFFSET ?

-- name: forget
-- The places of envelopes of a range that lie wholly in dropped segments.
DELETE FROM places WHERE envelope IN (
    SELECT envelope FROM places WHERE envelope > ?1 AND envelope <= ?2 GROUP BY envelope
    HAVING sum((place >> 32) / 1000000 NOT IN (SELECT segment FROM exports)) = 0
)

-- name: trigger
SELECT sql FROM sqlite_schema WHERE type = 'trigger' AND name = ?

-- name: size
SELECT sum(pgsize) FROM dbstat WHERE name = ? AND aggregate = 1

-- name: balance
SELECT account, period, resource, quota, reserved, spent, unknown FROM balances
WHERE account = ? AND period = ? AND resource = ?

-- name: holding
SELECT reserved FROM holdings WHERE account = ? AND period = ? AND resource = ? AND envelope = ?

-- name: end_holding
DELETE FROM holdings WHERE account = ? AND period = ? AND resource = ? AND envelope = ?

-- name: balances
SELECT account, period, resource, quota, reserved, spent, unknown FROM balances
WHERE account BETWEEN ? AND ? AND period BETWEEN ? AND ? ORDER BY account, period, resource

-- name: holders
SELECT envelope, reserved FROM holdings WHERE account = ? AND period = ? AND resource = ? AND reserved > 0
ORDER BY reserved DESC, envelope LIMIT ?

-- name: count_holders
SELECT count(*) FROM holdings WHERE account = ? AND period = ? AND resource = ? AND reserved > 0

-- name: holdings
SELECT account, period, resource, envelope, reserved FROM holdings ORDER BY account, period, resource, envelope

-- name: currency
SELECT code FROM currency

-- name: set_currency
INSERT INTO currency (one, code) VALUES (1, ?) ON CONFLICT (one) DO NOTHING

-- name: cursor
SELECT chain, position FROM cursors WHERE consumer = ? ORDER BY chain

-- name: move_cursor
INSERT INTO cursors (consumer, chain, position) VALUES (?, ?, ?)
ON CONFLICT (consumer, chain) DO UPDATE SET position = max(position, excluded.position)
