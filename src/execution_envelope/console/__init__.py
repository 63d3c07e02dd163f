"""The console: web pages and the HTTP API over a ledger, served by ``envelope serve``. Needs the extra ``console``."""
