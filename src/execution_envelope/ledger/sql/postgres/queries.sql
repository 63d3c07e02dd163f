-- name: session
-- Who connects, to what; and from now on nothing waits for long, and what is committed is on the disk. Names lead to
-- one schema only, so that another one further back in the search path is never taken for a part of the ledger.
SELECT s.name, current_setting('fsync'), current_setting('server_encoding'), current_setting('server_version_num')::int,
    set_config('synchronous_commit', CASE current_setting('synchronous_commit')
        WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, false),
    set_config('statement_timeout', %(timeout)s, false),
    set_config('lock_timeout', %(timeout)s, false),
    set_config('idle_in_transaction_session_timeout', %(timeout)s, false),
    set_config('tcp_keepalives_idle', '5', false),
    set_config('tcp_keepalives_interval', '2', false),
    set_config('tcp_keepalives_count', '3', false),
    set_config('plan_cache_mode', 'force_generic_plan', false),
    set_config('default_transaction_isolation', 'read committed', false),
    set_config('default_transaction_read_only', %(read_only)s, false),
    set_config('search_path', coalesce(quote_ident(s.name) || ', pg_temp', current_setting('search_path')), false)
FROM (SELECT current_schema()::text AS name OFFSET 0) AS s

-- name: tables
SELECT c.relname::text FROM pg_class AS c
WHERE c.relnamespace = (SELECT oid FROM pg_namespace WHERE nspname = current_schema()) AND c.relkind IN ('r', 'p', 'f')
    AND NOT EXISTS (
        SELECT 1 FROM pg_depend AS d
        WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e'
    )

-- name: schema_version
SELECT version FROM ledger_schema

-- name: lock_schema
-- One makes or migrates the schema, or opens a chain, at a time.
SELECT pg_advisory_xact_lock(1702258003, (oid::bigint %% 2147483647)::int)::text
FROM pg_namespace WHERE nspname = current_schema()

-- name: open_chain
WITH opened AS (
    INSERT INTO chains (number, id)
    SELECT coalesce(
        (SELECT max(number) FROM chains WHERE number >= s.number * 1000000::bigint) + 1, s.number * 1000000::bigint
    ), %s::text
    FROM (SELECT max(number) AS number FROM segments) AS s RETURNING number
)
INSERT INTO events (chain, position, body, hash) SELECT number, 0, %s::bytea, %s::bytea FROM opened RETURNING chain

-- name: try_hold
SELECT pg_try_advisory_lock(%s::bigint)

-- name: evict
-- Whoever holds it: an older session of this process, that the server has not found to be gone yet.
SELECT pg_terminate_backend(pid) FROM pg_locks
WHERE locktype = 'advisory' AND granted AND objsubid = 1 AND pid <> pg_backend_pid()
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND ((classid::bigint << 32) | objid::bigint) = %s::bigint

-- name: hold
SELECT pg_advisory_lock(%s::bigint)::text

-- name: family_locks
SELECT count(CASE WHEN alone THEN pg_advisory_xact_lock(1702258001, bucket)::text
    ELSE pg_advisory_xact_lock_shared(1702258001, bucket)::text END)
FROM unnest(%s::int[], %s::bool[]) AS l (bucket, alone)

-- name: store
-- Everything that a group adds, in one statement. Nothing is inserted before the locks are held.
WITH held AS MATERIALIZED (
    SELECT count(pg_advisory_xact_lock_shared(1702258001, bucket)) AS locks FROM unnest(%(buckets)s::int[]) AS bucket
), e AS (
    INSERT INTO events (chain, position, body, hash, sealed)
    SELECT %(chain)s::bigint, %(first)s::bigint + r.n, r.body, r.hash, r.sealed
    FROM unnest(%(bodies)s::bytea[], %(hashes)s::bytea[], %(sealed)s::bytea[])
        WITH ORDINALITY AS r (body, hash, sealed, n), held
    WHERE held.locks >= 0
), p AS (
    INSERT INTO places (envelope, sequence, type, chain, position)
    SELECT r.envelope, r.sequence, r.type, %(chain)s::bigint, %(first)s::bigint + r.n
    FROM unnest(%(envelopes)s::text[], %(sequences)s::int[], %(types)s::text[])
        WITH ORDINALITY AS r (envelope, sequence, type, n), held
    WHERE held.locks >= 0
)
SELECT locks FROM held

-- name: store_beside
WITH held AS MATERIALIZED (
    SELECT count(pg_advisory_xact_lock_shared(1702258001, bucket)) AS locks FROM unnest(%(buckets)s::int[]) AS bucket
), e AS (
    INSERT INTO events (chain, position, body, hash, sealed)
    SELECT %(chain)s::bigint, %(first)s::bigint + r.n, r.body, r.hash, r.sealed
    FROM unnest(%(bodies)s::bytea[], %(hashes)s::bytea[], %(sealed)s::bytea[])
        WITH ORDINALITY AS r (body, hash, sealed, n), held
    WHERE held.locks >= 0
), p AS (
    INSERT INTO places (envelope, sequence, type, chain, position)
    SELECT r.envelope, r.sequence, r.type, %(chain)s::bigint, %(first)s::bigint + r.n
    FROM unnest(%(envelopes)s::text[], %(sequences)s::int[], %(types)s::text[])
        WITH ORDINALITY AS r (envelope, sequence, type, n), held
    WHERE held.locks >= 0
), c AS (
    INSERT INTO closings (envelope) SELECT r FROM unnest(%(closings)s::text[]) AS r, held WHERE held.locks >= 0
), k AS (
    INSERT INTO keys (digest, request, envelope)
    SELECT r.* FROM unnest(%(digests)s::text[], %(requests)s::text[], %(owners)s::text[]) AS r, held
    WHERE held.locks >= 0
), f AS (
    INSERT INTO children (parent, envelope)
    SELECT r.* FROM unnest(%(parents)s::text[], %(children)s::text[]) AS r, held WHERE held.locks >= 0
), b AS (
    INSERT INTO bindings (kind, reference, ordinal, envelope)
    SELECT r.* FROM unnest(%(kinds)s::text[], %(references)s::text[], %(ordinals)s::int[], %(bound)s::text[]) AS r, held
    WHERE held.locks >= 0
)
SELECT locks FROM held

-- name: standing_keys
SELECT digest, request, envelope FROM keys WHERE digest = ANY (%s::text[])

-- name: standing_sequences
SELECT e.id, coalesce((SELECT max(p.sequence) + 1 FROM places AS p WHERE p.envelope = e.id), 0)
FROM unnest(%s::text[]) AS e (id)

-- name: standing_families
SELECT c.parent, c.envelope, coalesce((SELECT max(p.sequence) + 1 FROM places AS p WHERE p.envelope = c.envelope), 0)
FROM children AS c WHERE c.parent = ANY (%s::text[]) ORDER BY c.parent, c.envelope

-- name: standing_lines
SELECT b.kind, b.reference, b.envelope,
    EXISTS (SELECT 1 FROM closings AS c WHERE c.envelope = b.envelope),
    EXISTS (SELECT 1 FROM places AS p WHERE p.envelope = b.envelope AND p.type = 'granted')
FROM unnest(%s::text[], %s::text[]) AS r (kind, reference)
JOIN bindings AS b ON b.kind = r.kind AND b.reference = r.reference
ORDER BY b.kind, b.reference, b.ordinal

-- name: bodies
SELECT p.envelope, e.sealed FROM places AS p JOIN events AS e ON e.chain = p.chain AND e.position = p.position
WHERE p.envelope = ANY (%s::text[]) AND p.sequence = 0

-- name: tail
SELECT position, hash FROM events WHERE chain = %s::bigint ORDER BY position DESC LIMIT 1

-- name: segments
SELECT number FROM segments ORDER BY number

-- name: newest_segment
SELECT max(number) FROM segments

-- name: events_of
SELECT e.body, e.sealed FROM places AS p LEFT JOIN events AS e ON e.chain = p.chain AND e.position = p.position
WHERE p.envelope = %s::text ORDER BY p.sequence

-- name: find
SELECT envelope FROM bindings AS b WHERE kind = %s::text AND reference = %s::text ORDER BY
    NOT EXISTS (SELECT 1 FROM closings AS c WHERE c.envelope = b.envelope)
        OR EXISTS (SELECT 1 FROM places AS p WHERE p.envelope = b.envelope AND p.type = 'granted') DESC,
    ordinal DESC
LIMIT 1

-- name: key
SELECT digest, request, envelope FROM keys WHERE digest = %s::text

-- name: children
SELECT envelope FROM children WHERE parent = %s::text ORDER BY envelope

-- name: newest
SELECT envelope FROM places WHERE envelope < %s::text AND sequence = 0 ORDER BY envelope DESC LIMIT %s::int

-- name: unfinished
SELECT max(p.envelope), array_agg(p.envelope ORDER BY p.envelope) FILTER (WHERE c.envelope IS NULL)
FROM (SELECT envelope FROM places WHERE envelope > %s::text AND sequence = 0 ORDER BY envelope LIMIT %s::int) AS p
LEFT JOIN closings AS c ON c.envelope = p.envelope

-- name: opening
SELECT e.body FROM chains AS c JOIN events AS e ON e.chain = c.number AND e.position = 0 WHERE c.id = %s::text

-- name: chain_of
SELECT c.id FROM places AS p JOIN chains AS c ON c.number = p.chain WHERE p.envelope = %s::text AND p.sequence = %s::int

-- name: chain_number
SELECT number FROM chains WHERE id = %s::text

-- name: note
WITH noted AS (
    INSERT INTO attempted_requests (at, surface, reason, status, detail, request_id, dropped)
    VALUES (%s, %s, %s, %s, %s, %s, %s) RETURNING ordinal
)
DELETE FROM attempted_requests WHERE ordinal <= (SELECT ordinal FROM noted) - %s::int

-- name: attempted
SELECT at, surface, reason, status, detail, request_id, dropped FROM attempted_requests
ORDER BY ordinal DESC LIMIT %s::int

-- name: chains
SELECT number, id FROM chains ORDER BY number

-- name: heads
SELECT c.number, c.id, coalesce(e.position, -1), e.hash
FROM chains AS c LEFT JOIN LATERAL (
    SELECT position, hash FROM events WHERE chain = c.number ORDER BY position DESC LIMIT 1
) AS e ON true
ORDER BY c.number

-- name: rows
SELECT position, body, hash, sealed FROM events
WHERE chain = %s::bigint AND position > %s::bigint AND position <= %s::bigint ORDER BY position LIMIT %s::int

-- name: rows_of
SELECT c.id, p.position, e.body, e.hash, e.sealed
FROM places AS p JOIN events AS e ON e.chain = p.chain AND e.position = p.position
LEFT JOIN chains AS c ON c.number = p.chain
WHERE p.envelope = %s::text ORDER BY p.sequence

-- name: steps
-- The page first: the planner must know that it is short.
SELECT p.envelope, p.sequence, p.type, p.chain, p.position, c.envelope IS NOT NULL, e.body, e.hash, e.sealed, b.hash
FROM (
    SELECT * FROM places WHERE (envelope, sequence) > (%s::text, %s::bigint) AND envelope <= %s::text
    ORDER BY envelope, sequence LIMIT %s::int
) AS p
LEFT JOIN events AS e ON e.chain = p.chain AND e.position = p.position
LEFT JOIN events AS b ON b.chain = p.chain AND b.position = p.position - 1
LEFT JOIN closings AS c ON c.envelope = p.envelope
ORDER BY p.envelope, p.sequence

-- name: events_of_many
SELECT p.envelope, p.sequence, p.type, p.chain, p.position, c.envelope IS NOT NULL, e.body, e.hash, e.sealed, b.hash
FROM places AS p
LEFT JOIN events AS e ON e.chain = p.chain AND e.position = p.position
LEFT JOIN events AS b ON b.chain = p.chain AND b.position = p.position - 1
LEFT JOIN closings AS c ON c.envelope = p.envelope
WHERE p.envelope = ANY (%s::text[]) AND p.type = ANY (%s::text[])
ORDER BY p.envelope, p.sequence

-- name: decisions
-- The page first, as above.
SELECT p.envelope, p.sequence, p.type, p.chain, p.position,
    p.sequence = 0 AND EXISTS (SELECT 1 FROM closings AS c WHERE c.envelope = p.envelope), e.body, e.sealed
FROM (
    SELECT * FROM places WHERE (envelope, sequence) > (%s::text, %s::bigint) AND envelope <= %s::text
        AND type = ANY (%s::text[])
    ORDER BY envelope, sequence LIMIT %s::int
) AS p
LEFT JOIN events AS e ON e.chain = p.chain AND e.position = p.position
ORDER BY p.envelope, p.sequence

-- name: split
SELECT envelope FROM places WHERE envelope > %s::text ORDER BY envelope LIMIT 1 OFFSET %s::int

-- name: strays
-- Chain numbers are looked at one gap after the other, behind each number that has no next one.
SELECT e.chain, e.position
FROM (
    SELECT -9223372036854775808 AS first, coalesce((SELECT min(number) FROM chains), 9223372036854775807) AS next
    UNION ALL
    SELECT c.number + 1, coalesce((SELECT min(number) FROM chains WHERE number > c.number), 9223372036854775807)
    FROM chains AS c WHERE NOT EXISTS (SELECT 1 FROM chains AS n WHERE n.number = c.number + 1)
) AS gap
JOIN events AS e ON e.chain >= gap.first AND e.chain < gap.next
LIMIT 100

-- name: keys
SELECT digest, request, envelope FROM keys WHERE digest > %s::text ORDER BY digest LIMIT %s::int

-- name: bindings
SELECT kind, reference, ordinal, envelope FROM bindings
WHERE (kind, reference, ordinal) > (%s::text, %s::text, %s::int) ORDER BY kind, reference, ordinal LIMIT %s::int

-- name: families
SELECT parent, envelope FROM children WHERE (parent, envelope) > (%s::text, %s::text)
ORDER BY parent, envelope LIMIT %s::int

-- name: closings
SELECT envelope FROM closings WHERE envelope > %s::text AND envelope <= %s::text ORDER BY envelope LIMIT %s::int

-- name: count
-- By the newest entry of each chain: to count them one by one takes too long here.
SELECT coalesce(sum((SELECT max(position) + 1 FROM events WHERE chain = c.number)), 0)::bigint FROM chains AS c

-- name: renew
INSERT INTO leases AS l (chain, renewals) SELECT number, 1 FROM chains WHERE id = ANY (%s::text[])
ON CONFLICT (chain) DO UPDATE SET renewals = l.renewals + 1

-- name: lease
SELECT renewals FROM leases WHERE chain = (SELECT number FROM chains WHERE id = %s::text)

-- name: insert_checkpoint
INSERT INTO checkpoints (number, body) VALUES (%s::bigint, %s::bytea) ON CONFLICT (number) DO NOTHING

-- name: checkpoint
SELECT body FROM checkpoints WHERE number = %s::bigint

-- name: checkpoints
SELECT body FROM (SELECT number, body FROM checkpoints ORDER BY number DESC LIMIT %s::bigint) AS c ORDER BY number

-- name: description
-- What guards the ledger's tables: name -> definition, in words that do not differ between versions of PostgreSQL.
WITH here AS (
    SELECT oid FROM pg_namespace WHERE nspname = current_schema()
), t AS (
    SELECT c.* FROM pg_class AS c WHERE c.relnamespace = (SELECT oid FROM here) AND c.relname = ANY (%s::text[])
)
SELECT 'table ' || t.relname, concat_ws(', ', 'kind ' || t.relkind::text, 'persistence ' || t.relpersistence::text,
    CASE WHEN t.relrowsecurity THEN 'row security' END, 'partitioned by ' || pg_get_partkeydef(t.oid),
    pg_get_expr(t.relpartbound, t.oid), 'part of ' || (
        SELECT string_agg(i.inhparent::regclass::text, ' ') FROM pg_inherits AS i WHERE i.inhrelid = t.oid
    ))
FROM t
UNION ALL
SELECT 'part ' || i.inhrelid::regclass::text || ' of ' || t.relname, ''
FROM t JOIN pg_inherits AS i ON i.inhparent = t.oid
UNION ALL
SELECT 'column ' || t.relname || '.' || a.attname, concat_ws(', ', format_type(a.atttypid, a.atttypmod),
    CASE WHEN a.attnotnull THEN 'not null' END,
    (SELECT 'collate ' || o.collname FROM pg_collation AS o WHERE o.oid = a.attcollation),
    (SELECT 'default ' || pg_get_expr(d.adbin, d.adrelid) FROM pg_attrdef AS d
        WHERE d.adrelid = a.attrelid AND d.adnum = a.attnum),
    'identity ' || nullif(a.attidentity::text, ''), 'generated ' || nullif(a.attgenerated::text, ''))
FROM t JOIN pg_attribute AS a ON a.attrelid = t.oid AND a.attnum > 0 AND NOT a.attisdropped
UNION ALL
SELECT 'constraint ' || c.conname || ' on ' || t.relname, pg_get_constraintdef(c.oid, true)
FROM t JOIN pg_constraint AS c ON c.conrelid = t.oid AND c.contype <> 'n'
UNION ALL
SELECT 'index ' || c.relname || ' on ' || t.relname, pg_get_indexdef(i.indexrelid, 0, true)
    || CASE WHEN i.indisvalid AND i.indisready THEN '' ELSE ', not valid' END
FROM t JOIN pg_index AS i ON i.indrelid = t.oid JOIN pg_class AS c ON c.oid = i.indexrelid
UNION ALL
SELECT 'trigger ' || g.tgname || ' on ' || t.relname, concat_ws(', ', 'type ' || g.tgtype, 'enabled ' || g.tgenabled::text,
    'calls ' || g.tgfoid::regproc::text, 'when ' || g.tgqual::text, 'of ' || nullif(g.tgattr::text, ''))
FROM t JOIN pg_trigger AS g ON g.tgrelid = t.oid AND (NOT g.tgisinternal OR g.tgparentid <> 0)
UNION ALL
SELECT 'rule ' || r.rulename || ' on ' || t.relname, pg_get_ruledef(r.oid, true)
FROM t JOIN pg_rewrite AS r ON r.ev_class = t.oid
UNION ALL
SELECT 'function ' || p.oid::regprocedure::text, concat_ws(', ', l.lanname, p.prorettype::regtype::text,
    CASE WHEN p.prosecdef THEN 'security definer' END, p.proconfig::text, trim(p.prosrc))
FROM pg_proc AS p JOIN pg_language AS l ON l.oid = p.prolang
WHERE p.pronamespace = (SELECT oid FROM here) AND p.proname LIKE 'ledger\_%%'
ORDER BY 1

-- name: insert_segment
INSERT INTO segments (number) VALUES (%s::int)

-- name: exported
SELECT segment FROM exports ORDER BY segment

-- name: exports
SELECT segment, body, checkpoint FROM exports ORDER BY segment

-- name: insert_export
INSERT INTO exports (segment, body, checkpoint) VALUES (%s::int, %s::bytea, %s::bigint)

-- name: heads_in
SELECT c.number, c.id, coalesce(e.position, -1), e.hash
FROM chains AS c LEFT JOIN LATERAL (
    SELECT position, hash FROM events WHERE chain = c.number ORDER BY position DESC LIMIT 1
) AS e ON true
WHERE c.number >= %s::bigint AND c.number < %s::bigint

-- name: segments_of
SELECT DISTINCT (chain / 1000000)::int FROM places WHERE envelope = %s::text ORDER BY 1

-- name: closed
SELECT 1 FROM closings WHERE envelope = %s::text

-- name: envelopes_in
SELECT count(DISTINCT envelope) FROM places WHERE chain >= %s::bigint AND chain < %s::bigint

-- name: unfinished_in
SELECT DISTINCT p.envelope FROM places AS p
WHERE p.chain >= %s::bigint AND p.chain < %s::bigint
    AND NOT EXISTS (SELECT 1 FROM closings AS c WHERE c.envelope = p.envelope)
ORDER BY 1 LIMIT %s::int

-- name: part
-- Where a range of about so many places ends.
SELECT envelope FROM places WHERE envelope > %s::text AND envelope <= %s::text ORDER BY envelope LIMIT 1 OFFSET %s::int

-- name: forget
-- The places of envelopes of a range that lie wholly in dropped segments.
WITH gone AS (
    DELETE FROM places WHERE envelope IN (
        SELECT envelope FROM places WHERE envelope > %s::text AND envelope <= %s::text GROUP BY envelope
        HAVING bool_and(chain / 1000000 IN (SELECT segment FROM exports))
    ) RETURNING 1
)
SELECT count(*) FROM gone

-- name: size
SELECT pg_total_relation_size(to_regclass(%s::text))

-- name: account_locks
-- Whoever changes balances holds the locks of their accounts until its end, taken in one order.
SELECT count(pg_advisory_xact_lock(1702258005, bucket)::text) FROM unnest(%s::int[]) AS l (bucket)

-- name: standing_balances
SELECT b.account, b.period, b.resource, b.quota, b.reserved, b.spent, b.unknown
FROM unnest(%s::text[], %s::text[], %s::text[]) AS k (account, period, resource)
JOIN balances AS b ON b.account = k.account AND b.period = k.period AND b.resource = k.resource

-- name: standing_holdings
SELECT h.account, h.period, h.resource, h.envelope, h.reserved
FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[]) AS k (account, period, resource, envelope)
JOIN holdings AS h
    ON h.account = k.account AND h.period = k.period AND h.resource = k.resource AND h.envelope = k.envelope

-- name: put_balances
INSERT INTO balances (account, period, resource, quota, reserved, spent, unknown)
SELECT * FROM unnest(%s::text[], %s::text[], %s::text[], %s::bigint[], %s::bigint[], %s::bigint[], %s::bigint[])
ON CONFLICT (account, period, resource) DO UPDATE
SET quota = excluded.quota, reserved = excluded.reserved, spent = excluded.spent, unknown = excluded.unknown

-- name: put_holdings
INSERT INTO holdings (account, period, resource, envelope, reserved)
SELECT * FROM unnest(%s::text[], %s::text[], %s::text[], %s::text[], %s::bigint[])
ON CONFLICT (account, period, resource, envelope) DO UPDATE SET reserved = excluded.reserved

-- name: end_holdings
DELETE FROM holdings AS h USING unnest(%s::text[], %s::text[], %s::text[], %s::text[]) AS k (account, period, resource, envelope)
WHERE h.account = k.account AND h.period = k.period AND h.resource = k.resource AND h.envelope = k.envelope

-- name: balances
SELECT account, period, resource, quota, reserved, spent, unknown FROM balances
WHERE account BETWEEN %s::text AND %s::text AND period BETWEEN %s::text AND %s::text
ORDER BY account, period, resource

-- name: holders
SELECT envelope, reserved FROM holdings
WHERE account = %s::text AND period = %s::text AND resource = %s::text AND reserved > 0
ORDER BY reserved DESC, envelope LIMIT %s::int

-- name: count_holders
SELECT count(*) FROM holdings WHERE account = %s::text AND period = %s::text AND resource = %s::text AND reserved > 0

-- name: holdings
SELECT account, period, resource, envelope, reserved FROM holdings ORDER BY account, period, resource, envelope

-- name: currency
SELECT code FROM currency

-- name: set_currency
INSERT INTO currency (one, code) VALUES (1, %s::text) ON CONFLICT (one) DO NOTHING

-- name: cursor
SELECT chain, position FROM cursors WHERE consumer = %s::text ORDER BY chain

-- name: move_cursor
INSERT INTO cursors AS c (consumer, chain, position)
SELECT %s::text, m.chain, m.position FROM unnest(%s::text[], %s::bigint[]) AS m (chain, position) ORDER BY m.chain
ON CONFLICT (consumer, chain) DO UPDATE SET position = greatest(c.position, excluded.position)
